"""Faults: one file each. The file's name is the fault's name."""
