"""Blueprints: what may grow, as data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.registry import Registry

if TYPE_CHECKING:
    from esper.blueprints.graph import Graph

__all__ = ["CATALOGUE"]

CATALOGUE: Registry[Graph] = Registry("esper.blueprints.catalogue", group="esper.blueprints")
