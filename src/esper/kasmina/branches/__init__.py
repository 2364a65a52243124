"""Kernels beside a layer: where they fit, and how they become part of it."""
