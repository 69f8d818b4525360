"""Methods that make a network smaller; so far pruning."""
