"""A trained model as files that score without the training code."""
