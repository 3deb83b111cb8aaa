"""The model store: weights by name, source and digest."""
