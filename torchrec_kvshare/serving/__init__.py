"""The server round the engine."""
