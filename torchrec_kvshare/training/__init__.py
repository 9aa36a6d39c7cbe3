"""Train and evaluate: loops, metrics, and the run that joins them."""
