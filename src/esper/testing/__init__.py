"""Suites that come with Esper: whoever adds a blueprint runs the same checks as the ones in the catalogue."""
