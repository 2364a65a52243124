"""Kasmina grows: seeds inside a model, from a dormant place to wider layers."""
