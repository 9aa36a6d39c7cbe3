"""The collection, ranking models with K/V as an input, and quantised tables."""
