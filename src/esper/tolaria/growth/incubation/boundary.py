"""Where the processes of a run meet: once per optimizer step, before growth looks at anything.

Each brings one record of whole numbers, and all read all of them, so what follows from them is the same
everywhere to the bit. It holds a digest of everything that growth did so far: a process that went another way
is noticed at the next step.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from esper.contracts import Decision, Stage
from esper.distributed.collectives import Peers
from esper.errors import ProcessError
from esper.kasmina.race.initialisers import STARTS
from esper.kasmina.race.lifecycle import FAULTS
from esper.tolaria.growth.run.state import RunState

ACTIONS: tuple[Literal["widen", "graft", "nothing"], ...] = ("widen", "graft", "nothing")
WAYS = tuple(STARTS)  # by number, as ranks tell each other


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What a process brings."""

    step: int
    topology: int  # digest of the model's growth
    lineage: int  # digest of all moves of seeds
    loss: int  # the bits of a float64
    examples: int
    faults: int  # of each awake kernel, see :func:`packed`
    asked: int  # index of the site the user asked for, -1 without
    paused: int


@dataclass(frozen=True, slots=True)
class StepConsensus:
    """What holds in all of them."""

    loss: float  # mean
    examples: int  # of the largest batch; growth's own work is planned by it
    faults: list[int]  # of each awake kernel, in all
    asked: int  # rank 0's
    paused: bool  # rank 0's
    alike: bool  # whether all went the same way so far


def sync_step(peers: Peers, own: StepRecord, seeds: int) -> StepConsensus:
    """Exchange records.

    Args:
        peers: Processes of the run.
        own: Record of this one.
        seeds: Number that are awake.

    Raises:
        ProcessError: The processes are at different steps or hold different models.
    """
    fields = [getattr(own, name) for name in StepRecord.__slots__]
    records = [StepRecord(*numbers) for numbers in peers.all_gather_ints(fields)]
    for what in ("step", "topology"):
        found = [getattr(one, what) for one in records]
        if len(set(found)) > 1:
            raise ProcessError(
                f"the processes differ in {what}: {', '.join(map(str, found))} in the order of ranks; "
                "start the run again with --resume auto"
            )
    losses = [number(one.loss) for one in records]
    faults = (unpacked(one.faults, seeds) for one in records)
    return StepConsensus(
        loss=sum(losses) / len(losses),
        examples=max(one.examples for one in records),
        faults=[sum(counts) for counts in zip(*faults, strict=True)],
        asked=records[0].asked,
        paused=bool(records[0].paused),
        alike=len({one.lineage for one in records}) == 1,
    )


def same_decision(peers: Peers, decision: Decision, names: Sequence[str]) -> Decision:
    """Return rank 0's decision: where, how wide, from which starts; the explanation is each process's own."""
    if peers.world == 1:
        return decision
    index = -1 if decision.site is None else names.index(decision.site)
    start = -1 if decision.start is None else WAYS.index(decision.start)
    own = [ACTIONS.index(decision.action), index, decision.width, start]
    first = [int(number) for number in peers.broadcast_floats(own)]
    if first == own:
        return decision
    action, index, width, start = first
    site = None if index < 0 else names[index]
    how = None if start < 0 else WAYS[start]
    return replace(decision, action=ACTIONS[action], site=site, width=width, start=how)


def realign(run: RunState) -> None:
    """Bring processes that went different ways together again, on rank 0's.

    The models are the same ones (a difference there ends the run): only what growth was about to do differs.
    So the seeds that are awake are dropped everywhere, and rank 0's random streams, experience and counters
    are taken over.
    """
    orchestrator, layout, peers = run.orchestrator, run.morphable.layout, run.peers
    for trial in list(orchestrator.trials.values()):
        run.tamiyo.learn(orchestrator.cull(trial, "the processes went different ways"), run.steps)
    for seed in range(len(layout.stage)):
        layout.clear(seed)
    layout.stage.fill_(int(Stage.DORMANT))
    own = {
        "tamiyo": run.tamiyo.state_dict(),
        "streams": run.parts.streams.state_dict(),
        "counters": [run.events_kept, run.parts.gate.looks, orchestrator.lineage, run.parts.epochs],
        "losses": list(orchestrator.losses),
    }
    state = json.loads(peers.broadcast_bytes(json.dumps(own).encode()))
    run.tamiyo.load_state_dict(state["tamiyo"])
    run.parts.streams.load_state_dict(state["streams"])
    run.events_kept, run.parts.gate.looks, orchestrator.lineage, run.parts.epochs = state["counters"]
    orchestrator.mixed.clear()
    orchestrator.losses.clear()
    orchestrator.losses.extend(state["losses"])
    orchestrator.cool_until = -1
    why = "the processes went different ways; the awake seed was dropped and rank 0's growth taken over"
    run.tell("ranks", world=peers.world, rank=peers.rank, why=why)


def packed(counts: Sequence[int]) -> int:
    """Write the faults of each awake kernel as one number, two bits each; a third ends a seed anyway."""
    return sum(min(count, FAULTS) << 2 * index for index, count in enumerate(counts))


def unpacked(number: int, seeds: int) -> list[int]:
    """Return the faults of each of so many kernels."""
    return [number >> 2 * index & 3 for index in range(seeds)]


def bits(value: float) -> int:
    """Return a float's bits as a whole number."""
    return int.from_bytes(struct.pack("<d", value), "little", signed=True)


def number(value: int) -> float:
    """Return the float of these bits."""
    return struct.unpack("<d", value.to_bytes(8, "little", signed=True))[0]
