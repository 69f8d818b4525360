"""Activation records: what a teacher's activations on its training data were, released in place of the data."""
