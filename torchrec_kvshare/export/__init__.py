"""Export a trained model to files that score without the training code."""
