"""Contexts in which a pass over the user's model leaves no trace."""
