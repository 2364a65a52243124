"""Keeps a run alive: vital signs, tests of them, and what is done about a fault."""

from esper.nissa.detectors import Finding, Vitals
from esper.tolaria.governor.governor import Actions, Governor, Settings
from esper.tolaria.governor.hooks import GovernorHooks
from esper.tolaria.governor.rollback import Snapshots
from esper.tolaria.governor.vitals import Reading, VitalsReader

__all__ = [
    "Actions",
    "Finding",
    "Governor",
    "GovernorHooks",
    "Reading",
    "Settings",
    "Snapshots",
    "Vitals",
    "VitalsReader",
]
