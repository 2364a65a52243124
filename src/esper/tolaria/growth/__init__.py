"""The conductor: turns the ring at step boundaries, from wrap to unwrap."""

from esper.tolaria.growth.begin import grow
from esper.tolaria.growth.dry_run import plan
from esper.tolaria.growth.growth import Growth

__all__ = ["Growth", "grow", "plan"]
