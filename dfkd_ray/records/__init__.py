"""Activation records: what is released with a network in place of its training data."""
