"""A run as the conductor tells it: two pairs, one growth refused, two kept, one seed in trouble."""

from __future__ import annotations

import math
from collections.abc import Iterator

from esper.contracts import Event

SITES = [
    {
        "name": "conv1>conv2",
        "between": ["BatchNorm2d bn1", "ReLU"],
        "width": 4,
        "unit_parameters": 84,
        "unit_flops": 5200,
    },
    {
        "name": "conv2>fc",
        "between": ["ReLU", "AdaptiveAvgPool2d", "flatten"],
        "width": 8,
        "unit_parameters": 47,
        "unit_flops": 4628,
    },
]
REFUSED = [["fc", "its outputs are the model's outputs, so their number is given"]]


def decision(number: int, step: int, site: str | None, width: int = 0, reason: str = "") -> Iterator[Event]:
    surveys = [
        {
            "site": "conv1>conv2",
            "improvement": 0.031 / number,
            "examples": 512,
            "dead": 0.0,
            "gradient_norm": 0.8,
        },
        {
            "site": "conv2>fc",
            "improvement": 0.054 / number,
            "examples": 512,
            "dead": 0.125,
            "gradient_norm": 1.1,
        },
    ]
    arms = [
        {"site": "conv1>conv2", "width": 4, "start": "mixed", "score": 2.1e-6, "prior": 0.42},
        {"site": "conv2>fc", "width": 8, "start": "mixed", "score": 3.1e-6, "prior": 1.0},
        {"site": "conv2>fc", "width": 8, "start": "svd", "score": 3.1e-6, "prior": 0.9},
    ]
    yield Event("survey", step, {"decision": number, "sites": surveys})
    data = {
        "decision": number,
        "action": "widen" if site else "nothing",
        "site": site,
        "width": width,
        "start": "mixed" if site else None,
        "reason": reason,
        "arms": arms if site else [],
        "propensity": 0.8,
        "predicted": 3.1e-6 if site else None,
    }
    yield Event("decision", step, data)


def move(step: int, seed: int, site: str, source: str, target: str, reason: str) -> Event:
    return Event(
        "stage", step, {"seed": seed, "site": site, "source": source, "target": target, "reason": reason}
    )


def judged(number: int, step: int, site: str, seed: int, width: int, gain: float) -> Iterator[Event]:
    candidates = [
        {"start": "svd", "loss": 0.61},
        {"start": "svd", "loss": 0.66},
        {"start": "random", "loss": 0.71},
    ]
    yield move(step, seed, site, "DORMANT", "GERMINATED", "scheduled")
    yield move(step, seed, site, "GERMINATED", "TRAINING", f"8 candidates of {width} units")
    yield Event(
        "race",
        step + 20,
        {
            "decision": number,
            "site": site,
            "candidates": candidates,
            "winner": 0,
            "amplitude": 0.5,
            "nothing": 0.74,
            "start": "svd",
            "batched": True,
        },
    )
    passed = gain > 0
    gate = {
        "decision": number,
        "site": site,
        "look": number,
        "e_value": 412.0 if passed else 0.3,
        "threshold": 320.0,
        "gain": gain,
        "examples": 180,
        "passed": passed,
        "reason": "e-value above the threshold" if passed else "no gain",
    }
    yield Event("gate", step + 20, gate)


def outcome(
    number: int, step: int, site: str, kept: bool, gain: float, parameters: int, reason: str
) -> Event:
    data = {
        "decision": number,
        "site": site,
        "kept": kept,
        "gain": gain,
        "parameters": parameters,
        "flops": parameters * 60,
        "cost_flops": 4_000_000,
        "reason": reason,
    }
    return Event("outcome", step, data)


def kept(
    number: int, step: int, site: str, seed: int, width: int, gain: float, total: int
) -> Iterator[Event]:
    yield from judged(number, step, site, seed, width, gain)
    yield move(step + 20, seed, site, "TRAINING", "GRAFTING", "held-out evidence")
    for offset in range(5, 41, 5):
        yield Event("alpha", step + 20 + offset, {"seed": seed, "site": site, "alpha": offset / 40})
    yield move(step + 60, seed, site, "GRAFTING", "STABILISING", "α is 1")
    yield move(step + 70, seed, site, "STABILISING", "EVALUATING", "settled")
    producer, consumer = site.split(">")
    widened = {
        "decision": number,
        "site": site,
        "units": width,
        "edits": [
            [f"{producer}.weight", 0, 4, 4 + width],
            [f"{producer}.bias", 0, 4, 4 + width],
            [f"{consumer}.weight", 1, 4, 4 + width],
        ],
        "parameters": total,
        "difference": 1.2e-7,
        "milliseconds": 3.4,
    }
    yield Event("widened", step + 90, widened)
    yield move(step + 90, seed, site, "EVALUATING", "FOSSILISED", "not worse than before exposure")
    yield outcome(number, step + 90, site, True, gain, width * 84, "kept")
    yield move(step + 90, seed, site, "FOSSILISED", "DORMANT", "")


def digits_run(steps: int = 900) -> list[Event]:
    """The whole run, in the order of its steps, with one second between events."""
    events = [
        Event(
            "run_started",
            0,
            {
                "model": "DigitsCNN",
                "parameters": 426,
                "flops": 46_000,
                "sites": SITES,
                "refused": REFUSED,
                "budget": {"parameters": 1704, "growth_events": 8},
                "seed": 0,
                "steps": steps,
            },
        ),
        *decision(1, 90, "conv2>fc", 8, "scheduled; conv2>fc promises most per FLOP"),
        *kept(1, 90, "conv2>fc", 4, 8, 0.021, 426 + 376),
        *decision(2, 270, "conv1>conv2", 4, "brought forward: the loss has stalled"),
        *judged(2, 270, "conv1>conv2", 0, 4, -0.0004),
        move(290, 0, "conv1>conv2", "TRAINING", "CULLED", "no evidence"),
        outcome(
            2, 290, "conv1>conv2", False, -0.0004, 0, "e-value 0.3 stayed below 320; the host never felt it"
        ),
        move(290, 0, "conv1>conv2", "CULLED", "EMBARGOED", ""),
        move(317, 0, "conv1>conv2", "EMBARGOED", "DORMANT", "the cool-down is over"),
        *decision(3, 400, None, 0, "no arm promises more than doing nothing"),
        *decision(4, 480, "conv1>conv2", 4, "scheduled; conv1>conv2 promises most per FLOP"),
        *kept(4, 480, "conv1>conv2", 0, 4, 0.012, 426 + 376 + 336),
        Event(
            "fault",
            505,
            {"seed": 0, "site": "conv1>conv2", "error": "FloatingPointError: inf in the branch", "count": 1},
        ),
        Event(
            "fallback", 505, {"what": "host output used at conv1>conv2", "why": "the branch was not finite"}
        ),
        Event("warning", 0, {"message": "steps= was not given <b>"}),
    ]
    for step in range(0, steps + 1, 20):
        grown = 426 + (376 if step >= 180 else 0) + (336 if step >= 570 else 0)
        loss = 0.05 + 2.2 * math.exp(-step / 160) + 0.03 * math.sin(step / 17)
        events.append(
            Event(
                "progress",
                step,
                {
                    "loss": loss if step != 520 else math.nan,
                    "parameters": grown,
                    "growth_flops": 5_000_000 * (step // 90),
                    "training_flops": 4_600_000 * step,
                    "seconds": step / 100,
                },
            )
        )
    for epoch in range(1, 11):
        accuracy = 0.97 - 0.6 * math.exp(-epoch / 2.5)
        events.append(
            Event("epoch", epoch * steps // 10, {"epoch": epoch, "metrics": {"accuracy": accuracy}})
        )
    events.append(
        Event(
            "run_finished",
            steps,
            {
                "parameters": 1138,
                "flops": 104_000,
                "training_flops": 4_600_000 * steps,
                "growth_flops": 50_000_000,
                "seconds": 9.2,
                "growth_seconds": 0.4,
                "grown": [["conv2>fc", 8], ["conv1>conv2", 4]],
            },
        )
    )
    events.sort(key=lambda event: event.step)
    return [Event(event.kind, event.step, event.data, 1_700_000_000.0 + i) for i, event in enumerate(events)]


def survived() -> list[Event]:
    """What may befall a run and not end it."""
    alarm = {"alarm": "spike", "signal": "loss", "action": "rollback", "since": 448}
    alarm |= {"value": 12.5, "usual": 0.2, "expected": None, "message": "loss 12.5, usual 0.2; rollback"}
    back = {"to": 440, "lost": 10, "lost_in_all": 10, "message": "rolled back to step 440: loss 12.5"}
    return [
        Event("checkpoint", 201, {"name": "step-00000200", "step": 200, "bytes": 51_200, "seconds": 0.002}),
        Event("resumed", 200, {"step": 200, "name": "step-00000200"}),
        Event("alarm", 450, alarm),
        Event("rolled_back", 450, back),
        Event("ranks", 460, {"world": 1, "rank": 1, "why": "lost: no heartbeat in 30 s"}),
        Event("rewrapped", 470, {"sites": ["conv1>conv2"], "milliseconds": 12.0}),
    ]
