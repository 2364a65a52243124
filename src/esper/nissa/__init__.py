"""Nissa watches: the journal of a run, what it amounts to, and the pages and lines that show it."""
