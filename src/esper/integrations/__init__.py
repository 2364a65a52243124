"""Integrations: what other programs Esper can work through; one optional package a file."""
