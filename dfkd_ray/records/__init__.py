"""Activation records: statistics of a teacher's activations on its training data, released instead of the data."""
