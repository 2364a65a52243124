"""The seeds that are awake, as checkpoints and tables show them."""

from __future__ import annotations

import math

from esper.contracts import Stage
from esper.kasmina.race.orchestrator import SeedOrchestrator


def awake(orchestrator: SeedOrchestrator) -> list[dict[str, object]]:
    """List the seeds that are not dormant: stage, α, evidence."""
    model, trial = orchestrator.model, orchestrator.trial
    layout = model.layout
    found: list[dict[str, object]] = []
    for seed in range(len(layout.stage)):
        stage = layout.stage_of(seed)
        if stage is Stage.DORMANT:
            continue
        decision = trial.decision if trial is not None and trial.seed == seed else None
        gain = float(layout.gain[seed])
        found.append(
            {
                "seed": seed,
                "site": model.site_of(seed),
                "stage": stage.name,
                "alpha": float(layout.alpha[seed]),
                "gain": gain if math.isfinite(gain) else None,
                "faults": int(layout.faults[seed]),
                "decision": None if decision is None else decision.id,
                "width": None if decision is None else decision.width,
            }
        )
    return found
