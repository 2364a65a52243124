"""Blueprints that come with Esper: one file each, and the file's name is the blueprint's name."""
