"""Pipelines as commands: where they lie, their help, and how a mistake of a user ends."""
