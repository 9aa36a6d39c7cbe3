"""Where cache meets model: the engine, encoded users, files of requests."""
