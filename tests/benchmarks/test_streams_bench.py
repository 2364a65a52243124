"""The streams bench says what it could not measure, and judges a ratio by its distance from 1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import streams
from esper.kasmina.seeds.streams import StreamPool


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_measured_and_nothing_is_missed(tmp_path: Path, capsys) -> None:
    assert streams.main(["--out", str(tmp_path)]) == 0
    assert "not measured: there is no CUDA device here" in capsys.readouterr().out
    record = json.loads((tmp_path / "streams.json").read_text())
    assert record["verdict"] is record["cases"] is record["device"] is None
    assert record["promises"] == []


@pytest.mark.gpu
def test_on_a_device_every_case_has_a_verdict(tmp_path: Path) -> None:
    assert streams.main(["--quick", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "streams.json").read_text())
    assert {case["verdict"] for case in record["cases"].values()} <= {"gain", "none", "loss"}


def test_a_verdict_is_a_gain_only_beyond_noise() -> None:
    assert [streams.verdict(ratio) for ratio in (0.9, 0.99, 1.0, 1.019, 1.1)] == [
        "gain", "none", "none", "none", "loss",
    ]  # fmt: skip
    assert streams.ratio({"in turns": [2.0, 4.0, 1.0], "streams": [1.0, 4.0, 2.0]}) == 1.0


@pytest.mark.parametrize("case", streams.CASES[:2] + streams.CASES[4:5], ids=lambda case: case.name)
def test_what_is_timed_goes_back_to_host_and_kernel(case: streams.Case) -> None:
    host, kernel = case.layer(), case.layer()
    streams.step(StreamPool(), host, kernel, torch.randn(case.shape), torch.tensor(0.5))
    for module in (host, kernel):
        assert isinstance(module, nn.Module)
        assert all(parameter.grad is not None for parameter in module.parameters())
