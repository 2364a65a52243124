"""The end of a race: the best candidate at its best amplitude, on training batches none has learned from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from esper.batches.layout import Batch
from esper.blueprints.kernel import LiveKernel
from esper.kasmina.race.gate import Verdict
from esper.kasmina.race.needs import Services
from esper.kasmina.race.race import AMPLITUDES, Race
from esper.kasmina.race.trial import Training
from esper.surgery.isolation.contexts import untouched


@dataclass(frozen=True, slots=True)
class Selection:
    """Who won, and what is told of it."""

    kernel: LiveKernel | None  # None: doing nothing was better
    facts: dict[str, object]


def select_winner(
    trial: Training, batches: Sequence[Batch], services: Services, host: nn.Module, examples: int
) -> Selection:
    """Return the winner; amplitude 0 is "do nothing", which competes in every race.

    Args:
        trial: Its candidates have learned.
        batches: Training batches that no candidate has seen.
        services: Means to run the host, random streams and the ledger.
        host: Left untouched.
        examples: Examples in a step, for the ledger.
    """
    race, decision = trial.race, trial.origin.decision.id
    scores = score(trial, batches, services, host, examples)
    winner = int(scores.argmin())
    with (
        untouched(host, services.streams.draw("evidence")),
        services.ledger.growth("amplitude", decision, examples),
    ):
        curves = [race.amplitudes(winner, lambda b=batch: services.passes.loss_of(b)) for batch in batches]
    curve = torch.stack(curves).mean(0)
    services.peers.all_reduce_mean([curve])
    amplitude = AMPLITUDES[int(torch.nan_to_num(curve, nan=math.inf).argmin())]
    facts: dict[str, object] = {
        "candidates": [
            {"start": start, "loss": finite(loss)}
            for start, loss in zip(race.starts, scores.tolist(), strict=True)
        ],
        "winner": winner,
        "amplitude": amplitude,
        "nothing": finite(float(curve[0])),
        "start": race.starts[winner],
        "batched": race.batched,
    }
    return Selection(race.kernel(winner, amplitude) if amplitude != 0.0 else None, facts)


def score(
    trial: Training, batches: Sequence[Batch], services: Services, host: nn.Module, examples: int
) -> Tensor:
    """Return each candidate's mean loss over the batches; non-finite counts as worst."""
    losses, race, decision = list[Tensor](), trial.race, trial.origin.decision.id
    for batch in batches:
        with (
            untouched(host, services.streams.draw("evidence")),
            torch.no_grad(),
            services.ledger.growth("score", decision, len(race.starts), examples),
        ):
            losses.append(race.losses(lambda b=batch: services.passes.loss_of(b)))
    mean = torch.stack(losses).mean(0)
    services.peers.all_reduce_mean([mean])
    return torch.nan_to_num(mean, nan=math.inf)


def ask(trial: Training, kernel: LiveKernel, batches: Sequence[Batch], services: Services) -> Verdict:
    """Let the gate look at a winner."""
    charged = partial(services.ledger.growth, "gate", trial.origin.decision.id)
    draw = services.streams.draw("evidence")
    return services.gate.look(trial.origin.layer, kernel, batches, draw, charged)


def told(verdict: Verdict) -> dict[str, object]:
    """Return a verdict as an event tells it."""
    found = {name: finite(getattr(verdict, name)) for name in ("e_value", "threshold")}
    return {**asdict(verdict), **found}


def notes(race: Race, site: str) -> list[str]:
    """Say what of a race went otherwise than planned."""
    found = list[str]()
    if not race.batched:
        found.append(
            f"the model or loss did not run under vmap ({race.unbatched}); from then on candidates ran "
            "one by one, a pass for each in place of one"
        )
    if race.missed:
        many = "a lesson was" if race.missed == 1 else f"{race.missed} lessons were"
        found.append(f"{many} missed: the pass did not come by {site}")
    return found


def finite(value: float) -> float | None:
    """Return a finite number, or None: JSON has no infinity."""
    return float(value) if math.isfinite(value) else None
