"""A run as it was journalled, and what it amounts to."""
