"""Keeps a run alive: vital signs, tests of them, and what is done about a fault."""

from esper.tolaria.governor.detectors import Detectors, Finding
from esper.tolaria.governor.governor import Actions, Governor, Settings
from esper.tolaria.governor.hooks import GovernorHooks
from esper.tolaria.governor.rollback import Snapshots
from esper.tolaria.governor.vitals import Reading, Vitals, VitalsReader

__all__ = [
    "Actions",
    "Detectors",
    "Finding",
    "Governor",
    "GovernorHooks",
    "Reading",
    "Settings",
    "Snapshots",
    "Vitals",
    "VitalsReader",
]
