"""One file for each ``python -m pipelines.benchmark scenario=NAME``."""
