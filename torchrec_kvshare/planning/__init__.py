"""Which cache some traffic needs: a plan before there is a model, and advice for a model."""
