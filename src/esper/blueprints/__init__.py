"""Blueprints: what may grow, as data."""

from __future__ import annotations

from esper.registry import Registry

__all__ = ["CATALOGUE"]

CATALOGUE = Registry("esper.blueprints.catalogue", group="esper.blueprints")  # .get(name) is a Graph
