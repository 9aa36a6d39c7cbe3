"""Train and evaluate: the loop, metrics, evaluation, and the run that joins them."""
