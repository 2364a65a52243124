"""Tezzeret compiles: kernels from blueprints, in the background, checked before use."""
