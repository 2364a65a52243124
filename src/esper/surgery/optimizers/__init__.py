"""Optimizers, averages and their state, made to follow a model that changes its shape."""
