"""Tamiyo decides: when to look for growth, where, and what."""
