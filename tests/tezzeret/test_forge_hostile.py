"""Builds that loop, hoard, crash, lie and reach out are contained, and the next one works."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.errors import BlueprintError, CompileError, EsperError, ForgeError
from esper.tezzeret.forge import Forge
from esper.tezzeret.limits import MIB, Limits
from tests.tezzeret import forge_builds, forge_torch
from tests.tezzeret.forge_builds import Ask
from tests.tezzeret.test_forge import SECONDS, alive, until

LIMITS = Limits(wall=30, memory=300 * MIB, file=16 * MIB, open_files=200, request=100 * MIB)


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    with Forge(forge_builds.build, limits=LIMITS, retries=0) as forge:
        yield forge


@pytest.mark.parametrize(
    ("ask", "kind", "why"),
    [
        (Ask("python_bomb"), ForgeError, "more memory than"),
        (Ask("children_bomb"), ForgeError, "MiB resident, 375 allowed"),
        (Ask(graph='["linear", "nan"]'), CompileError, "not finite"),
        (Ask(signature=forge_builds.Signature("vector", "serial", 4, 5)), CompileError, "5 are declared"),
        (Ask(graph='["linear", "system"]'), BlueprintError, "node 1: no operator system"),
        (Ask(graph=json.dumps(["linear"] * 1_000_000), hidden=100), ForgeError, "limits"),
        (Ask(graph="[" * 100_000), CompileError, "Recursion"),
        (Ask("leaves_now"), ForgeError, "exit status 3"),
        (Ask("segfaults"), ForgeError, r"signal SIGSEGV[\s\S]*string_at"),
        (Ask("large_file"), ForgeError, r"larger file than Limits\.file"),
        (Ask("many_files"), ForgeError, r"more files than Limits\.open_files"),
        (Ask("unforeseen"), ForgeError, r"exit status 1[\s\S]*not an error anyone lists"),
        (Ask("wrong_id"), ForgeError, "its facts have the digest"),
        (Ask("no_kernel"), CompileError, "AttributeError"),
        (Ask("not_json"), CompileError, "ValueError"),
        (Ask("no such task"), CompileError, "KeyError"),
        (Ask("speaks_out_of_turn"), ForgeError, "a worker sent"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or (value if isinstance(value, str) else value.task),
)
def test_a_hostile_build_ends_in_an_error_that_says_why(
    forge: Forge, ask: Ask, kind: type[EsperError], why: str
) -> None:
    ticket = forge.submit(ask)
    with pytest.raises(kind, match=why):
        ticket.result(SECONDS)
    assert ticket.state == "failed"
    assert forge.submit(Ask(seed=time.monotonic_ns())).result(SECONDS)


def test_a_tensor_too_many_is_refused_and_the_worker_lives_on() -> None:
    limits = Limits(memory=900 * MIB, wall=SECONDS)
    with Forge(forge_torch.build, limits=limits, warm=forge_torch.warm) as forge:
        with pytest.raises(ForgeError, match=r"needed more memory than Limits\.memory allows"):
            forge.submit(Ask("hoard")).result(SECONDS)
        assert forge.submit(Ask()).result(SECONDS).report["threads"] == 1


@pytest.mark.parametrize("task", ["endless", "asleep"])
def test_wall_time_is_limited(task: str) -> None:
    with Forge(forge_builds.build, limits=Limits(wall=1), retries=3) as forge:
        ticket = forge.submit(Ask(task))
        with pytest.raises(ForgeError, match="1 s of wall time are over"):
            ticket.result(SECONDS)
        assert ticket.facts["attempts"] == 1


def test_cpu_time_is_limited_for_each_build_and_not_for_the_worker() -> None:
    with Forge(forge_builds.build, limits=Limits(cpu=1, wall=30)) as forge:
        with pytest.raises(ForgeError, match="1 s of CPU time are over"):
            forge.submit(Ask("endless")).result(SECONDS)
        assert forge.submit(Ask()).result(SECONDS)


def test_a_build_has_no_network(forge: Forge) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        address = (host, str(port))
        with pytest.raises(ForgeError, match="a build has no network"):
            forge.submit(Ask("connects", words=address)).result(SECONDS)
        ticket = forge.submit(Ask("connects_natively", words=address))
        with pytest.raises(CompileError, match="connected") as told:
            ticket.result(SECONDS)
    held = ticket.facts["held"]["network"]
    assert ("connected: False" in str(told.value)) == (held == "namespace and audit hook")


def test_children_of_a_worker_die_with_it(forge: Forge, tmp_path: Path) -> None:
    with pytest.raises(ForgeError, match="exit status 5"):
        forge.submit(Ask("leaves_a_child", words=(str(tmp_path / "pid"),))).result(SECONDS)
    pid = int((tmp_path / "pid").read_text())
    until(lambda: not alive(pid))


def test_deaths_are_retried_and_then_told_with_their_number() -> None:
    with Forge(forge_builds.build, retries=2) as forge:
        ticket = forge.submit(Ask("leaves_now"))
        with pytest.raises(ForgeError, match="3 attempts"):
            ticket.result(SECONDS)
        assert ticket.facts["attempts"] == 3


def test_a_worker_that_grew_fat_is_replaced_before_the_next_build() -> None:
    with Forge(forge_builds.build, limits=Limits(memory=24 * MIB)) as forge:
        pids = [forge.submit(Ask(seed=seed)).result(SECONDS).report["pid"] for seed in range(2)]
    assert len(set(pids)) == 2
    assert os.getpid() not in pids
