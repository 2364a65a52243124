"""The forge gives the right kernel to whoever asked, in the right order, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load

from esper.contracts import Event
from esper.errors import ConfigError, ForgeError
from esper.tezzeret.forge import Forge
from esper.tezzeret.limits import Limits
from tests.tezzeret import forge_builds, forge_torch
from tests.tezzeret.forge_builds import Ask

SECONDS = 60  # within which anything here is done, whatever else the machine does


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    with Forge(forge_builds.build) as forge:
        yield forge


def test_a_kernel_comes_back_as_it_was_built(forge: Forge) -> None:
    ask = Ask(seed=7)
    ticket = forge.submit(ask, step=3)
    made, here = ticket.result(SECONDS), forge_builds.build(ask)
    assert (made.id, made.graph, made.signature, made.hidden, made.seed) == (
        here.id, ask.graph, ask.signature, 3, 7,
    )  # fmt: skip
    assert made.weights == here.weights
    assert made.variants == here.variants
    assert ticket.state == "done"
    assert ticket.done()
    assert not ticket.cancel()


def test_a_build_sees_one_thread_no_secrets_and_a_folder_of_its_own(
    forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET_TOKEN", "x")
    with Forge("tests.tezzeret.forge_builds:build") as other:
        report = other.submit(Ask("environment", words=("a", "b"))).result(SECONDS).report
        folder = Path(report["folder"])
        assert folder.is_dir()
        assert folder != Path.cwd()
    assert not folder.exists()
    seen = report["environment"]
    assert "A_SECRET_TOKEN" not in seen
    assert seen["OMP_NUM_THREADS"] == "1"
    assert seen["HOME"] == seen["TMPDIR"] == report["folder"]
    assert report["words"] == ["a", "b"]


def test_facts_say_how_long_it_took_and_what_holds_each_limit(forge: Forge) -> None:
    ticket = forge.submit(Ask(seed=11))
    ticket.result(SECONDS)
    assert ticket.facts["attempts"] == 1
    assert 0 < ticket.facts["seconds"] < SECONDS
    assert ticket.facts["waited"] >= 0
    assert ticket.facts["peak_memory"] > 5 << 20
    assert ticket.facts["held"]["network"] in {"namespace and audit hook", "audit hook"}
    assert ticket.facts["held"].keys() == {"network", "memory", "cpu", "file"}


def test_the_same_request_is_the_same_ticket_built_once(forge: Forge) -> None:
    tickets = [forge.submit(Ask("slow", seed=20)) for _ in range(100)]
    assert len(set(map(id, tickets))) == 1
    assert forge.submit(Ask("slow", seed=21)).id != tickets[0].id
    made = tickets[0].result(SECONDS)
    assert forge.submit(Ask("slow", seed=20)).result(0) is made


def test_a_hundred_threads_asking_at_once_share_one_build(forge: Forge) -> None:
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda: found.append(forge.submit(Ask("slow", seed=30)).result(SECONDS)))
        for _ in range(100)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 100
    assert len(set(map(id, found))) == 1


def test_what_nobody_holds_is_not_kept(forge: Forge) -> None:
    first = forge.submit(Ask(seed=40)).result(SECONDS).report["order"]
    forge.submit(Ask(seed=41)).result(SECONDS)
    assert forge.submit(Ask(seed=40)).result(SECONDS).report["order"] > first


def test_higher_priorities_go_first_and_equal_ones_in_order(forge: Forge) -> None:
    blocker = forge.submit(Ask("slow", seed=50))
    tickets = {seed: forge.submit(Ask(seed=seed), priority=p) for seed, p in ((51, 0), (52, 5), (53, 0))}
    tickets[54] = forge.submit(Ask(seed=54))
    assert forge.submit(Ask(seed=54), priority=9) is tickets[54]
    blocker.result(SECONDS)
    when = {seed: ticket.result(SECONDS).report["order"] for seed, ticket in tickets.items()}
    assert sorted(when, key=lambda seed: when[seed]) == [54, 52, 51, 53]


def test_callbacks_run_on_the_forges_own_thread_and_may_raise(
    forge: Forge, caplog: pytest.LogCaptureFixture
) -> None:
    names: list[str] = []
    called = threading.Event()
    ticket = forge.submit(Ask("slow", seed=60))
    ticket.on_done(lambda _: 1 / 0)  # type: ignore[arg-type, return-value]
    ticket.on_done(lambda done: (names.append(threading.current_thread().name), done.state, called.set()))
    assert called.wait(SECONDS)
    assert names == ["esper-forge"]
    assert "ZeroDivisionError" in caplog.text
    assert forge.submit(Ask(seed=61)).result(SECONDS)


def test_the_asyncio_front_waits_without_blocking_and_without_cancelling(forge: Forge) -> None:
    async def both() -> int:
        ticket = forge.submit(Ask("slow", seed=70))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ticket.wait(), 0.01)
        beats = 0
        waiting = asyncio.ensure_future(ticket.wait())
        while not waiting.done():
            await asyncio.sleep(0.01)
            beats += 1
        assert waiting.result() is ticket.result(0)
        return beats

    assert asyncio.run(both()) > 3


def test_a_queued_ticket_is_cancelled_at_once(forge: Forge) -> None:
    blocker = forge.submit(Ask("slow", seed=80))
    ticket = forge.submit(Ask(seed=81))
    assert ticket.cancel()
    with pytest.raises(ForgeError, match="cancelled before"):
        ticket.result(SECONDS)
    assert not blocker.done()
    assert ticket.state == "cancelled"
    assert not ticket.cancel()
    again = forge.submit(Ask(seed=81))
    assert again is not ticket
    assert again.result(SECONDS).seed == 81


def test_a_running_ticket_is_cancelled_by_killing_its_worker(forge: Forge) -> None:
    before = forge.submit(Ask(seed=90)).result(SECONDS).report["pid"]
    ticket = forge.submit(Ask("asleep", seed=91))
    until(lambda: ticket.state == "running")
    assert ticket.cancel()
    with pytest.raises(ForgeError, match="cancelled"):
        ticket.result(SECONDS)
    assert ticket.state == "cancelled"
    assert forge.submit(Ask(seed=92)).result(SECONDS).report["pid"] != before
    assert not alive(before)


def test_two_workers_build_side_by_side() -> None:
    with Forge(forge_builds.build, workers=2) as forge:
        asleep = forge.submit(Ask("asleep"))
        tickets = [forge.submit(Ask(seed=seed)) for seed in range(3)]
        assert len({ticket.result(SECONDS).report["pid"] for ticket in tickets}) == 1
        assert asleep.state == "running"


def test_a_worker_that_died_is_replaced_and_the_observer_hears_of_it(tmp_path: Path) -> None:
    events: list[Event] = []
    with Forge(forge_builds.build, observe=events.append) as forge:
        ticket = forge.submit(Ask("dies_once", words=(str(tmp_path / "mark"),)), step=17)
        assert ticket.result(SECONDS)
        assert ticket.facts["attempts"] == 2
    assert [(event.kind, event.step, event.data["request"]) for event in events] == [
        ("warning", 17, ticket.id)
    ]
    assert "exit status 4" in events[0].data["message"]


def test_a_worker_that_dies_between_builds_is_replaced_unseen(forge: Forge) -> None:
    pid = forge.submit(Ask(seed=100)).result(SECONDS).report["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid))
    ticket = forge.submit(Ask(seed=101))
    assert ticket.result(SECONDS).report["pid"] != pid
    assert ticket.facts["attempts"] == 1


def test_a_worker_that_cannot_start_says_why() -> None:
    for build, warm, why in (
        ("tests.tezzeret.forge_builds:nothing", None, "cannot import 'tests.tezzeret.forge_builds:nothing'"),
        ("no_such_module:build", None, "No module named 'no_such_module'"),
        (forge_builds.build, forge_builds.cannot_warm, "no compiler here"),
    ):
        with Forge(build, warm=warm) as forge, pytest.raises(ForgeError, match=why):
            forge.submit(Ask()).result(SECONDS)


def test_a_started_forge_is_warm_and_an_unused_one_costs_nothing() -> None:
    threads = threading.active_count()
    with Forge(forge_torch.build, warm=forge_torch.warm) as forge:
        assert threading.active_count() == threads
        forge.start()
        forge.start()
        made = forge.submit(Ask()).result(SECONDS)
        assert made.report == {"threads": 1, "warmed": True}
        assert load(made.weights).keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert threading.active_count() == threads
    Forge(forge_builds.build).close()


def test_bad_arguments_are_refused(forge: Forge) -> None:
    with pytest.raises(ConfigError, match="workers"):
        Forge(forge_builds.build, workers=0)
    with pytest.raises(ConfigError, match="wall"):
        Limits(wall=0)
    with pytest.raises(ForgeError, match="top level"):
        Forge(lambda ask: forge_builds.build(ask))
    with pytest.raises(ForgeError, match="frozen dataclass"):
        forge.submit({"task": "kernel"})
    with pytest.raises(ForgeError, match="JSON values only"):
        forge.submit(Ask(words=(object(),)))  # type: ignore[arg-type]
    with pytest.raises(ForgeError, match=r"graph has 3000000 characters.*Limits\.request"):
        forge.submit(Ask(graph="x" * 3_000_000))


def test_close_ends_everything_and_a_closed_forge_says_so() -> None:
    forge = Forge(forge_builds.build)
    pid = forge.submit(Ask()).result(SECONDS).report["pid"]
    running, queued = forge.submit(Ask("asleep")), forge.submit(Ask(seed=1))
    until(lambda: running.state == "running")
    forge.close()
    forge.close()
    for ticket in (running, queued):
        with pytest.raises(ForgeError, match="closed"):
            ticket.result(0)
        assert ticket.state == "cancelled"
    assert not alive(pid)
    with pytest.raises(ForgeError, match="make a new Forge"):
        forge.submit(Ask())


def test_a_callback_may_close_the_forge() -> None:
    forge = Forge(forge_builds.build)
    closed = threading.Event()
    forge.submit(Ask()).on_done(lambda _: (forge.close(), closed.set()))
    assert closed.wait(SECONDS)


PARENT = """
import os, sys, time
from esper.tezzeret.forge import Forge
from tests.tezzeret import forge_builds
from tests.tezzeret.forge_builds import Ask
forge = Forge(forge_builds.build, workers=2)
pids = [forge.submit(Ask(seed=seed)).result(60).report["pid"] for seed in range(1)]
asleep = forge.submit(Ask("asleep"))
while asleep.state != "running":
    time.sleep(0.01)
print(*pids, flush=True)
if sys.argv[1] == "wait":
    time.sleep(600)
if sys.argv[1] == "fork" and os.fork() == 0:
    try:
        forge.submit(Ask(seed=99))
    except Exception as error:
        print("child:", error, flush=True)
    sys.exit(0)
elif sys.argv[1] == "fork":
    os.wait()
    assert asleep.state == "running"
    print("parent:", forge.submit(Ask(seed=5)).result(60).seed, flush=True)
"""


def parent(how: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", PARENT, how], stdout=subprocess.PIPE, text=True, env=env)


@pytest.mark.parametrize("how", ["end", "wait"])
def test_no_worker_outlives_its_parent(how: str) -> None:
    """Neither one that ends without closing its forge, nor one that is killed."""
    with parent(how) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert pids
        if how == "wait":
            process.kill()
        assert process.wait(SECONDS) == (-signal.SIGKILL if how == "wait" else 0)
    until(lambda: not any(alive(pid) for pid in pids))


def test_a_fork_of_the_parent_neither_uses_nor_ends_the_forge() -> None:
    with parent("fork") as process:
        out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert "child: this forge was made by the process this one was forked from" in out
    assert "parent: 5" in out


def test_requests_are_named_by_their_facts(forge: Forge) -> None:
    tickets = [forge.submit(Ask(seed=200)), forge.submit(Ask(seed=200, graph=json.dumps(["linear"])))]
    assert tickets[0].id != tickets[1].id
    assert all(len(ticket.id) == 64 for ticket in tickets)
    assert repr(tickets[0]).startswith(f"<Ticket {tickets[0].id[:12]}")
    assert [ticket.result(SECONDS).graph for ticket in tickets] == [Ask().graph, '["linear"]']


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)
