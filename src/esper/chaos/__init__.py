"""Chaos: real faults put into real runs, each in a process of its own, and what became of the run."""
