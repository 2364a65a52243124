"""Values nobody should give, and the few that fit: what the doors bench draws its arguments from."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn
from torch.nn import functional as F

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
BATCH = (X, X[:, :3].abs().argmax(1))
MOST_TEXT = 40
STEPS = 40


class Unnamed:
    """An object of a class nobody knows, whose repr fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no words")


class Raising:
    """Batches that cannot be read."""

    def __iter__(self) -> Any:
        raise RuntimeError("the loader broke")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 3))


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def wrong(*given: Any) -> Any:
    raise KeyError("of the user's own")


def harmless(text: str) -> str:
    """Leave a text nothing by which a path leads out of the bench's own folder."""
    return text.replace("/", "_").replace("..", "__").replace("~", "_")


TEXTS = st.one_of(
    st.text(max_size=MOST_TEXT).map(harmless),
    st.sampled_from(
        ["", "auto", "early", "stream", "widen", "10", "\0", "\x1b[31m", "x" * 300, "pipe", "a.json"]
    ),
)
NUMBERS = st.one_of(
    st.integers(-3, 64),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([True, False, 2**31, 2**63, 10**30, -(10**30), math.nan, math.inf, -math.inf, 1e-300]),
)
OBJECTS = [
    lambda: None,
    Unnamed,
    lambda: Unnamed,
    lambda: ...,
    lambda: 1j,
    lambda: b"x",
    lambda: {1, 2},
    lambda: range(3),
    lambda: iter([BATCH]),
    lambda: wrong,
    lambda: lambda: None,
    lambda: len,
    lambda: int,
    lambda: nn.Linear,
    lambda: nn.Linear(3, 3),
    lambda: nn.Identity(),
    net,
    lambda: torch.zeros(()),
    lambda: torch.zeros(3),
    lambda: torch.zeros(0, 6),
    lambda: torch.zeros(4, 5, dtype=torch.int64),
    lambda: torch.full((4, 6), math.nan),
    lambda: torch.zeros(4, 6, device="meta"),
    lambda: X.to_sparse(),
    lambda: X,
    lambda: BATCH,
    lambda: [BATCH],
    lambda: [None],
    lambda: [(X, BATCH[1] + 1000)],
    lambda: [(X[:, :3], BATCH[1])],
    lambda: [BATCH, (X[:0], BATCH[1][:0])],
    lambda: Raising(),
    lambda: loss_fn,
    lambda: torch.optim.SGD(net().parameters(), 0.1),
    lambda: {"a": 1},
    lambda: {1: 2},
    lambda: re.compile("0"),
    lambda: re.compile(b"0"),
    lambda: timedelta(seconds=1),
    lambda: timedelta(-1),
    lambda: Path("pipe"),
    lambda: Path("folder"),
    lambda: Path("/dev/zero"),
]
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
NESTS = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
ODD = st.one_of(NESTS, st.sampled_from(OBJECTS).map(lambda make: make()), NUMBERS, TEXTS)


def settings_like(model: Any) -> SearchStrategy[dict[str, Any]]:
    """Mappings with the keys of the settings, or nearly, and values that fit or do not."""
    fields: Mapping[str, Any] = model.model_fields
    names = st.sampled_from(sorted(fields)) | TEXTS

    def value(name: str) -> SearchStrategy[Any]:
        inner = getattr(fields.get(name), "annotation", None)
        nested = settings_like(inner) if hasattr(inner, "model_fields") else st.nothing()
        return nested | NESTS

    entry = names.flatmap(lambda name: st.tuples(st.just(name), value(name)))
    return st.lists(entry, max_size=3).map(dict)
