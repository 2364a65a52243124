"""Rows of like blocks, and one block more."""
