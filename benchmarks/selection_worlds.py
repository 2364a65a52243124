"""Worlds of arms whose best answer is known: what a bandit loses in one against the best of each moment."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from esper.tamiyo.bandits import Bandit

TRACES = (
    "stationary",
    "switching",
    "contextual",
    "contextual-switching",
    "own lines",
    "own lines, switching",
)
CONTEXTUAL = ("contextual", "contextual-switching", "own lines", "own lines, switching")
ARMS, FEATURES, DECISIONS = 8, 6, 400
SEGMENT = 100  # decisions between changes of a switching world
DELAY = 4  # decisions until a reward is known
NOISE = 0.2  # standard deviation of a reward
STRENGTH = 0.35  # standard deviation of what features explain
PRIOR = 0.5


@dataclass(frozen=True)
class World:
    """One trace: what every arm is worth at every decision, and what can be known of it."""

    worth: np.ndarray  # (decisions, arms) mean rewards
    features: np.ndarray  # (decisions, arms, 1 + features); the prior first
    noise: np.ndarray  # (decisions, arms)


def draw(trace: str, seed: int, decisions: int = DECISIONS) -> World:
    """Draw a world.

    In "contextual" every arm has features of its own at every decision, and one line holds for all, beside
    small differences of the arms; in "own lines" all arms see the same features and each has its own line.
    """
    rng = np.random.default_rng([seed, TRACES.index(trace)])
    own = trace.startswith("own lines")
    known = rng.normal(size=(decisions, 1 if own else ARMS, FEATURES)).repeat(ARMS if own else 1, axis=1)
    worth = np.empty((decisions, ARMS))
    for start in range(0, decisions, SEGMENT if "switching" in trace else decisions):
        means, scale = rng.uniform(0.1, 0.9, ARMS), STRENGTH / math.sqrt(FEATURES)
        lines, line = scale * rng.normal(size=(ARMS, FEATURES)), scale * rng.normal(size=FEATURES)
        part = slice(start, start + SEGMENT) if "switching" in trace else slice(None)
        if own:
            worth[part] = 0.5 + (known[part] * lines).sum(axis=2)
        elif trace.startswith("contextual"):
            worth[part] = 0.5 + known[part] @ line + 0.2 * (means - 0.5)
        else:
            worth[part] = means
    features = np.concatenate([np.full((decisions, ARMS, 1), PRIOR), known], axis=2)
    return World(worth.clip(0, 1), features, NOISE * rng.normal(size=worth.shape))


def regret(bandit: Bandit, world: World, seed: int) -> float:
    """Play a world through; what a decision lost on average against the best arm of its moment."""
    rng, lost, names = np.random.default_rng(seed), 0.0, [("arm", at) for at in range(ARMS)]
    coming: deque[tuple[int, int]] = deque()  # decisions whose reward is not known yet, and their arms
    for now, (worth, features) in enumerate(zip(world.worth, world.features, strict=True)):
        while coming and coming[0][0] + DELAY <= now:
            then, arm = coming.popleft()
            reward = float((world.worth[then, arm] + world.noise[then, arm]).clip(0, 1))
            bandit.learn(names[arm], world.features[then, arm], reward)
        arm, _ = bandit.choose(names, features, rng)
        coming.append((now, arm))
        lost += float(worth.max() - worth[arm])
    return lost / len(world.worth)
