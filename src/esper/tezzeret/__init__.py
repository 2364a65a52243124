"""Tezzeret compiles: a blueprint becomes a program, a compiled form, and the proof that the form is right."""
