"""Pipelines as commands: where their files are, their help, and one-line error messages."""
