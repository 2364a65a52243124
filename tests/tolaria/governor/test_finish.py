"""A run that ends, or rewraps, asks the governor before an exposed seed becomes part of the host."""

from __future__ import annotations

from tests.tolaria.governor.test_wiring import Plain


def test_a_parasite_is_not_folded_in_at_the_end_of_a_run() -> None:
    run = Plain("incubate")
    orchestrator = run.growth.run.orchestrator
    while not orchestrator.exposed:
        run.train(1)
    run.growth.loop.watch.examiner.before = [-100.0] * 256  # the host was far better off without it
    run.growth.finish()
    outcome = [e.data for e in run.events if e.kind == "outcome"][-1]
    assert not outcome["kept"]
    assert "harm" in outcome["reason"]
    assert not run.growth.plans
