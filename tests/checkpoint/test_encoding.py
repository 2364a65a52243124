"""Nested state comes back as it was, and what cannot come back is refused by its path."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper.checkpoint.format.encoding import DTYPES, Packing, Unpacking
from esper.checkpoint.format.manifest import packed, safetensors_chunks
from esper.errors import StateError


def there_and_back(state: Any) -> Any:
    skeleton, tensors = packed(state)
    text = json.dumps(skeleton, allow_nan=False)
    content = b"".join(safetensors_chunks(tensors))
    return Unpacking(safetensors.torch.load(content)).unpack(json.loads(text))


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and bytes(one.reshape(-1).view(torch.uint8)) == bytes(
            other.reshape(-1).view(torch.uint8)
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return one == other


KEYS = st.one_of(st.text(), st.integers(), st.tuples(st.integers(), st.text()), st.none(), st.booleans())
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(),
    st.builds(lambda n, d: torch.ones(n).to(d), st.integers(0, 3), st.sampled_from(list(DTYPES))),
    st.builds(lambda n: np.arange(n, dtype=np.uint32), st.integers(0, 3)),
    st.builds(np.float64, st.floats(allow_nan=False)),
)  # fmt: skip
STATES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
    ),
    max_leaves=12,
)


@given(STATES)
def test_every_state_comes_back(state: Any) -> None:
    assert same(there_and_back(state), state)


def test_the_tags_themselves_may_be_keys() -> None:
    state = {"tensor": "x", "dict": {"tuple": [1]}, "a/b": torch.ones(1), "a": {"b": torch.zeros(1)}}
    assert same(there_and_back(state), state)
    assert there_and_back(Counter("abca")) == Counter("abca")


def test_tied_tensors_are_stored_once_and_come_back_apart() -> None:
    tied = torch.arange(4.0)
    skeleton, tensors = packed({"a": tied, "b": tied.detach(), "c": tied[1:]})
    assert list(tensors) == ["a", "c"]
    back = Unpacking(tensors).unpack(skeleton)
    back["a"].zero_()
    assert torch.equal(back["b"], tied)


def test_a_snapshot_does_not_follow_the_run() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    _, tensors = packed([weight])
    with torch.no_grad():
        weight.zero_()
    assert torch.equal(tensors["0"], torch.ones(2))
    assert not tensors["0"].requires_grad


class Custom:
    pass


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (Custom(), r"/a/1/x'?, a .*Custom"),
        ({1, 2}, "a builtins.set"),
        (lambda: 0, "function"),
        (np.array(["a"]), "only numbers"),
        (torch.eye(2).to_sparse(), "dense tensors"),
        (torch.zeros(1, dtype=torch.complex128), "ordinary types"),
        (torch.zeros(1, device="meta"), "dense tensors"),
        (CYCLE, "nested deeper"),
    ],
)
def test_what_cannot_come_back_is_refused_by_its_path(value: Any, reason: str) -> None:
    with pytest.raises(StateError, match=reason) as refused:
        Packing().pack({"a": [0, {"x": value}]})
    assert "/a/1/x" in str(refused.value)


@pytest.mark.parametrize("bad", [{"pickle": "x"}, {"tensor": "none"}, {"array": [1]}, {}, {"dict": 3}])
def test_what_was_not_packed_is_not_unpacked(bad: Any) -> None:
    with pytest.raises(StateError, match=r"format|unknown kind"):
        Unpacking({}).unpack([bad])
