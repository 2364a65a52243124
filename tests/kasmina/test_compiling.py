"""Graphs are counted, not assumed: what growth costs a compiled host, with real steps and real widenings."""

from __future__ import annotations

import copy
import gc
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

from esper.contracts import WidenEdit, WidenPlan
from esper.errors import CompileError, SiteError
from esper.kasmina.recording.flops import FlopMeter
from esper.kasmina.recording.recorder import record
from esper.kasmina.seeds.compiling import CompilePolicy, apply, blended, blocks, detect, uncompiled
from esper.surgery.isolation.seam import open_seam
from esper.surgery.widen_layers import widen

# There a second width is taken for a dynamic size, and one graph fits all.
BEFORE_2_12 = torch.__version__ < "2.12"

# Dynamo reads .grad of the activations between two compiled blocks; torch warns of its own reading.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, hidden), nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(x)))


class Net(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block(5) for _ in range(count)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Branch:
    """A gateway that adds α·k(x) in a graph, as a layer does."""

    def __init__(self, alpha: Tensor) -> None:
        self.alpha, self.kernel = alpha, nn.Linear(4, 4)
        self.x: Tensor | None = None
        self.finite: Tensor | None = None

    def enter(self, x: Tensor | None) -> None:
        self.x = x

    def leave(self, y: Tensor) -> Tensor:
        assert self.x is not None
        y, self.finite = blended(y, self.kernel(self.x.detach()), self.alpha)
        return y


class Run:
    """A compiled host in training; ``graphs`` counts what Dynamo has compiled since it was last asked."""

    def __init__(self, how: str, count: int = 3) -> None:
        torch.manual_seed(0)
        self.host = Net(count)
        self.net: nn.Module = self.host
        if how == "wrapped":
            self.net = apply(self.host, "whole", backend="eager")
        elif how == "in place":
            self.host.compile(backend="eager")
        elif how == "regional":
            assert apply(self.host, "regional", backend="eager") is self.host
        elif how == "regional, wrapped":
            for index, block in enumerate(self.host.blocks):
                self.host.blocks[index] = torch.compile(block, backend="eager")
        self.policy = detect(self.net)
        self.optimizer = torch.optim.Adam(self.host.parameters(), lr=0.01)
        self.x, self.seen = torch.randn(6, 4), count_graphs()

    def step(self, times: int = 2) -> None:
        for _ in range(times):
            self.net(self.x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def graphs(self) -> int:
        before, self.seen = self.seen, count_graphs()
        return self.seen - before

    def block(self, index: int) -> Any:
        block = self.host.blocks[index]
        return block._modules.get("_orig_mod", block)

    def wake(self, index: int, alpha: Tensor) -> tuple[Branch, Callable[[], None]]:
        branch, block = Branch(alpha), self.block(index)
        closers = [open_seam(block.fc1, "entry", branch), open_seam(block.fc2, "exit", branch)]
        closers.append(self.policy.stand_aside([block.fc1, block.fc2]))

        def cull() -> None:
            for close in closers:
                close()

        return branch, cull

    def commit(self, index: int) -> str:
        """Widen a block by one unit."""
        block = self.block(index)
        path = next(name for name, module in self.host.named_modules() if module is block)
        old, new = block.fc1.out_features, block.fc1.out_features + 1
        named = (("fc1.weight", 0, (1, 4)), ("fc1.bias", 0, (1,)), ("fc2.weight", 1, (4, 1)))
        plan = WidenPlan(
            "site",
            1,
            tuple(WidenEdit(f"{path}.{name}", axis, old, new, "") for name, axis, _ in named),
            ((f"{path}.fc1", "out_features", new), (f"{path}.fc2", "in_features", new)),
        )
        widened = widen(self.host, plan, {f"{path}.{name}": torch.randn(size) for name, _, size in named})
        assert not widened.replaced, "a compiled host's parameters keep their identity"
        self.optimizer = torch.optim.Adam(self.host.parameters(), lr=0.01)  # its surgery is another test's
        return self.policy.after_commit([block.fc1, block.fc2])


def count_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    names = ("recompile_limit", "skip_fwd_side_effects_in_bwd_under_checkpoint")
    before = {name: getattr(torch._dynamo.config, name) for name in names}
    torch._dynamo.reset()
    yield
    for name, value in before.items():
        setattr(torch._dynamo.config, name, value)
    torch._dynamo.reset()


# Inductor imports what torch itself calls outdated.
INDUCTOR = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

WAYS = ["wrapped", "in place", "regional", "regional, wrapped"]
KINDS = {"wrapped": "whole", "in place": "whole", "regional": "regional", "regional, wrapped": "regional"}

# -- what the user did --


@pytest.mark.parametrize("how", ["plain", *WAYS])
def test_a_policy_is_read_off_the_model(how: str) -> None:
    run = Run(how)
    assert run.policy.kind == KINDS.get(how, "none")
    assert run.policy.host is run.host
    assert len(run.policy.regions) == (3 if run.policy.kind == "regional" else 0)


def test_a_compiled_loss_counts_as_a_whole() -> None:
    net = Net()

    @torch.compile(backend="eager")
    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    policy = detect(net, loss_fn)
    assert (policy.kind, policy.host) == ("whole", net)
    for _ in range(12):
        loss_fn(net, torch.randn(2, 4)).backward()
        policy.after_commit([])
    before = count_graphs()
    loss_fn(net, torch.randn(2, 4))
    assert count_graphs() == before + 1, "its code was reset with the model's"


@INDUCTOR
@pytest.mark.parametrize("way", ["wrapped", "in place", "region"])
def test_cuda_graphs_are_refused_with_the_reason(way: str) -> None:
    net: nn.Module = Net()
    if way == "wrapped":
        net = torch.compile(net, mode="reduce-overhead")
    else:
        (net if way == "in place" else net.blocks[1]).compile(options={"triton.cudagraphs": True})
    with pytest.raises(SiteError, match=r"CUDA graphs.*max-autotune-no-cudagraphs"):
        detect(net)


@INDUCTOR
def test_apply_refuses_what_it_cannot_keep() -> None:
    net = Net()
    for kind in ("whole", "regional"):
        with pytest.raises(SiteError, match="CUDA graphs"):
            apply(net, kind, mode="reduce-overhead")
    assert detect(net).kind == "none", "nothing was left behind"
    assert apply(net, "none") is net
    with pytest.raises(CompileError, match='use the policy "whole"'):
        apply(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "regional")
    with pytest.raises(CompileError, match="compiled already"):
        apply(apply(net, "regional", backend="eager"), "whole")


def test_regions_are_the_outermost_blocks_of_the_users_own_classes() -> None:
    class Wrapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = Block(3)

    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Block(3), nn.ReLU()), Wrapping())
    assert list(blocks(net)) == ["1.0", "2"]


def test_an_eager_user_never_loads_the_compiler() -> None:
    script = (
        "import sys, torch; from esper.kasmina.seeds.compiling import detect, uncompiled\n"
        "policy = detect(torch.nn.Linear(2, 2))\n"
        "with policy.uncompiled(), uncompiled(): pass\n"
        "policy.after_commit([]); policy.make_room(); policy.stand_aside([])()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


# -- Esper's own passes --


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("warm", [False, True])
def test_own_passes_run_eagerly_through_the_compiled_object(how: str, warm: bool) -> None:
    run = Run(how)
    if warm:
        run.step()
    run.graphs()
    with run.policy.uncompiled():
        each = vmap(lambda row: run.net(row[None])[0])(run.x)
        with FlopMeter() as meter:
            plain = run.net(run.x)
        calls = record(run.host, lambda: run.net(run.x)).calls
        assert torch.autograd.grad(run.net(run.x).sum(), run.host.head.weight)[0].shape == (3, 4)
    torch.testing.assert_close(each, plain)
    assert meter.total == 2 * 6 * (3 * 2 * 4 * 5 + 4 * 3)
    assert [call.name for call in calls].count("linear") == 7
    assert run.graphs() == 0
    run.step()
    first = {"whole": 1, "regional": 2}  # blocks share a graph, but the first one's input needs no gradient
    assert run.graphs() == (0 if warm else first[KINDS[how]])


def test_the_outermost_uncompiled_ends_it() -> None:
    run = Run("wrapped")
    with uncompiled():
        with pytest.raises(ZeroDivisionError), uncompiled():
            raise ZeroDivisionError
        run.net(run.x)
        assert run.graphs() == 0
    run.net(run.x)
    assert run.graphs() == 1


# -- promises --


@pytest.mark.parametrize("how", WAYS)
def test_alpha_costs_nothing_waking_at_most_one_graph_and_culling_nothing(how: str) -> None:
    run, layout = Run(how), torch.zeros(4)
    run.step()
    run.graphs()
    woken = 1 if KINDS[how] == "whole" else 0
    branch, cull = run.wake(0, layout[1])
    run.step()
    assert run.graphs() == woken
    for step in range(1000):
        layout[1] = step / 1000
        run.step(1)
    assert run.graphs() == 0
    compiled = run.net(run.x)
    with run.policy.uncompiled():
        torch.testing.assert_close(compiled, run.net(run.x))
    assert branch.finite is not None
    assert bool(branch.finite)
    cull()
    run.step()
    assert run.graphs() == 0
    _, cull = run.wake(0, layout[2])
    run.step()
    cull()
    assert run.graphs() <= woken, "the same site again"
    _, cull = run.wake(1, layout[2])
    run.step()
    cull()
    run.step()
    assert run.graphs() == woken, "another site"


@pytest.mark.parametrize("how", WAYS)
def test_twenty_growths_compile_once_each_and_say_so(how: str, caplog: pytest.LogCaptureFixture) -> None:
    run, alpha = Run(how, count=2), torch.tensor(0.5)
    run.step()
    run.graphs()
    with caplog.at_level(logging.WARNING, logger="torch._dynamo"):
        for growth in range(20):
            if growth % 5 == 0:  # seeds wake too, and leave graphs of their own
                _, cull = run.wake(growth % 2, alpha)
                run.step(1)
                cull()
                run.graphs()
            why = run.commit(growth % 2)
            assert "new shapes" in why
            run.step()
            counted = run.graphs()
            assert counted == 1 or (BEFORE_2_12 and counted == 0), growth
    assert not [r for r in caplog.records if "recompile_limit" in r.getMessage()]
    compiled = run.net(run.x)
    with run.policy.uncompiled():
        torch.testing.assert_close(compiled, run.net(run.x))


@pytest.mark.skipif(BEFORE_2_12, reason="one graph fits all widths")
def test_torchs_own_limit_would_have_ended_it() -> None:
    run = Run("wrapped")
    run.step()
    run.graphs()
    object.__setattr__(run.policy, "kind", "none")  # nobody cares
    counted = []
    for _ in range(9):
        run.commit(0)
        run.step()
        counted.append(run.graphs())
    assert counted == [1] * 7 + [0] * 2


def test_culled_seeds_use_up_room_which_is_made_in_time() -> None:
    run = Run("wrapped", count=9)
    run.step()
    made = []
    for index in range(9):  # and the host's own graph: two more than torch would keep
        made.append(run.policy.make_room())
        _, cull = run.wake(index, torch.tensor(0.5))
        run.graphs()
        run.step()
        assert run.graphs() == 1, index
        cull()
    assert made[0] == ""
    assert [text for text in made if text] == ["3 of 8 graphs are in use; the limit is 16 now"]


def test_blocks_of_one_class_with_twelve_widths_stay_compiled() -> None:
    run = Run("regional", count=12)
    run.step()
    for index in range(12):
        for _ in range(index):
            run.commit(index)
        run.step()
    run.graphs()
    run.step()
    assert run.graphs() == 0
    compiled = sum(
        len(torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code)) for code in run.policy.codes()
    )
    assert compiled >= 12


def test_a_region_alone_in_its_class_lets_its_old_graphs_go() -> None:
    run = Run("regional", count=1)
    run.step()
    for _ in range(12):
        assert run.commit(0) == "blocks.0 has new shapes; one graph per mode is compiled"
        run.graphs()
        run.step()
        assert run.graphs() == 1
    assert torch._dynamo.config.recompile_limit == 8


def test_torchs_settings_are_put_back_once_the_last_run_leaves() -> None:
    config, checkpointed = torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"
    before = config.recompile_limit, getattr(config, checkpointed)
    one, other = Run("wrapped"), Run("in place")
    for run in (one, other):
        for batch in range(2, 6):  # graphs of their own: sizes are told apart
            run.x = torch.randn(batch, 4)
            torch._dynamo.mark_static(run.x)
            run.step()
        run.policy.make_room()
    raised = config.recompile_limit
    assert (raised > before[0], getattr(config, checkpointed)) == (True, True)
    assert (one.policy.leave(), config.recompile_limit) == ("", raised)
    assert [other.policy.leave(), other.policy.leave()] == ["", ""]
    assert (config.recompile_limit, getattr(config, checkpointed)) == before
    one.step()


def test_the_limit_stays_raised_where_blocks_need_more_graphs_than_it_holds() -> None:
    run = Run("regional", count=12)
    for index in range(12):
        for _ in range(index):
            run.commit(index)
    run.step()
    run.policy.make_room()  # as before a seed wakes
    assert "12 blocks share one code object" in run.policy.leave()
    raised = torch._dynamo.config.recompile_limit
    assert raised > 8
    del run.policy  # it goes with the run, the host stays
    gc.collect()
    assert torch._dynamo.config.recompile_limit == raised
    run.graphs()
    run.step()
    assert run.graphs() == 0


def test_a_compiled_container_of_torch_counts_too() -> None:
    host = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))
    net = apply(host, "whole", backend="eager")
    policy = detect(net)
    x = torch.randn(2, 4)
    net(x)
    for _ in range(12):
        before = count_graphs()
        policy.after_commit([host[0]])
        net(x)
        assert count_graphs() == before + 1


def test_frames_broken_by_the_users_code_are_reset_with_their_rests() -> None:
    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            return self.head(x)

    net = Broken()
    compiled = apply(net, "whole", backend="eager")
    policy = detect(compiled)
    compiled(torch.randn(2, 4))
    assert any(code.co_name.startswith("torch_dynamo_resume") for code in policy.codes())
    for _ in range(9):
        policy.after_commit([])
        before = count_graphs()
        compiled(torch.randn(2, 4))
        assert count_graphs() == before + 2


@pytest.mark.parametrize("how", WAYS)
def test_a_widening_that_is_put_back_costs_nothing(how: str) -> None:
    run = Run(how)
    run.step()
    run.graphs()
    path = next(name for name, module in run.host.named_modules() if module is run.block(0))
    edits = (WidenEdit(f"{path}.fc1.weight", 0, 5, 6, ""), WidenEdit(f"{path}.fc1.bias", 0, 5, 6, ""))
    edits += (WidenEdit(f"{path}.fc2.weight", 1, 5, 6, ""),)
    slices = dict(
        zip((e.name for e in edits), (torch.ones(1, 4), torch.ones(1), torch.ones(4, 1)), strict=True)
    )
    widen(run.host, WidenPlan("site", 1, edits, ()), slices).undo()
    run.step()
    assert run.graphs() == 0


def test_a_seed_in_a_checkpointed_block_keeps_the_host_compiled() -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.head(x)

    run = Run("plain")
    run.host.__class__ = Checkpointed
    run.net = apply(run.host, "whole", backend="eager")
    run.policy = detect(run.net)
    run.step()
    run.graphs()
    run.policy.make_room()
    branch, cull = run.wake(0, torch.tensor(0.5))
    run.step()
    assert run.graphs() == 1, "without the setting that make_room makes it is 0: skipped"
    compiled = run.net(run.x)
    with run.policy.uncompiled():
        torch.testing.assert_close(compiled, run.net(run.x))
    assert branch.finite is not None
    cull()
    run.step()
    assert run.graphs() == 0


# -- aside --


@pytest.mark.parametrize("how", ["regional", "regional, wrapped"])
def test_only_the_region_with_the_seed_steps_aside_and_comes_back_as_it_was(how: str) -> None:
    run = Run(how)
    run.step()
    run.graphs()
    held = [list(m.__dict__.items()) for m in run.host.modules()]
    first = run.policy.stand_aside([run.block(0).fc1])
    second = run.policy.stand_aside([run.block(0)])
    assert list(run.policy.aside) == ["blocks.0"]
    seen: list[Tensor] = []
    close = open_seam(run.block(0), "exit", Seeing(seen))
    run.step(1)
    assert len(seen) == 1, "a seam at the region's own border is felt"
    seen.clear()  # a copy would take the note along
    copied = copy.deepcopy(run.host)
    assert torch.equal(copied(run.x), run.net(run.x))
    run.graphs()  # the copy of what torch.compile returned compiles for itself
    close()
    first()
    assert list(run.policy.aside) == ["blocks.0"], "somebody still wants it"
    second()
    assert run.policy.aside == {}
    after = [list(m.__dict__.items()) for m in run.host.modules()]
    assert all(
        [key for key, _ in a] == [key for key, _ in b]
        and all(v is w for (_, v), (_, w) in zip(a, b, strict=True))
        for a, b in zip(held, after, strict=True)
    )
    run.step()
    assert run.graphs() == 0


class Seeing:
    def __init__(self, seen: list[Tensor]) -> None:
        self.seen = seen

    def enter(self, x: Tensor | None) -> None: ...

    def leave(self, y: Tensor) -> Tensor:
        self.seen.append(y)
        return y


# -- blending in a graph --


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_non_finite_kernel_leaves_the_host_alone_and_is_noticed_later(dtype: torch.dtype) -> None:
    mixed = torch.compile(blended, backend="eager", fullgraph=True)
    y, alpha = torch.randn(3, 4, dtype=dtype, requires_grad=True), torch.tensor(0.5)
    f = torch.randn(3, 4)
    out, finite = mixed(y, f, alpha)
    torch.testing.assert_close(out, y + 0.5 * f.to(dtype))
    assert bool(finite)
    for bad in (float("nan"), float("inf")):
        out, finite = mixed(y, f.masked_fill(torch.eye(3, 4).bool(), bad), alpha)
        assert torch.equal(out, y)
        assert not bool(finite)
        (gradient,) = torch.autograd.grad(out.sum(), y)
        assert torch.equal(gradient, torch.ones_like(y))


def test_a_policy_for_a_model_that_is_not_compiled_does_nothing() -> None:
    net = Net()
    policy = detect(net)
    assert policy == CompilePolicy("none", net)
    assert (policy.after_commit(net.modules()), policy.make_room()) == ("", "")
    policy.stand_aside(net.modules())()
