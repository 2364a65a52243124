"""Blueprints: what may grow, as data."""
