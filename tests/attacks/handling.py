"""What users do to a model in the middle of a run, each by its name: traced, copied, hooked, moved, saved."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize

from tests.cases.loops import cross_entropy

Handling = Callable[[nn.Module, Any], None]
X = torch.linspace(-1, 1, 30).reshape(3, 10)


def same(one: nn.Module, other: nn.Module) -> None:
    """Both say the same, bit for bit."""
    with torch.no_grad():
        assert torch.equal(one(X), other(X)), "another output"


def saved(net: nn.Module) -> Any:
    """Write and read a whole module."""
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def state_of(net: nn.Module) -> Any:
    """Write and read a state."""
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer)


def put_back(net: nn.Module, growth: Any) -> None:
    said = net(X).detach()
    state = state_of(net)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.mul_(0.5)
    net.load_state_dict(state)
    assert torch.equal(net(X).detach(), said), "another output"


def trained_copy(net: nn.Module, growth: Any) -> None:
    twin = copy.deepcopy(net)
    before = net(X).detach()
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        twin(X).square().mean().backward()
        optimizer.step()
    assert torch.equal(net(X).detach(), before), "the copy's training moved the model"


def hooked(kind: str, path: str) -> Handling:
    def handle(net: nn.Module, growth: Any) -> None:
        seen: list[int] = []

        def hook(*_: Any, **__: Any) -> None:
            seen.append(1)

        getattr(net.get_submodule(path), kind)(hook)
        net(X).sum().backward()
        net.zero_grad()
        assert seen, "the hook was not called"

    return handle


def exported(strict: bool) -> Handling:
    def handle(net: nn.Module, growth: Any) -> None:
        program = torch.export.export(net, (X,), strict=strict)
        torch.testing.assert_close(program.module()(X), net(X))

    return handle


def traced(net: nn.Module, growth: Any) -> None:
    torch.testing.assert_close(torch.jit.trace(net, (X,))(X), net(X))


def scripted(net: nn.Module, growth: Any) -> None:
    torch.testing.assert_close(torch.jit.script(net)(X), net(X))


def symbolic(net: nn.Module, growth: Any) -> None:
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(X), net(X))


def compiled(net: nn.Module, growth: Any) -> None:
    torch.testing.assert_close(torch.compile(net, backend="eager")(X), net(X))
    torch._dynamo.reset()


def mapped(net: nn.Module, growth: Any) -> None:
    torch.testing.assert_close(vmap(net)(X), net(X))


def ensembled(net: nn.Module, growth: Any) -> None:
    parameters, buffers = torch.func.stack_module_state([net, net])
    found = vmap(lambda p, b: functional_call(net, (p, b), (X,)))(parameters, buffers)
    torch.testing.assert_close(found[0], net(X))


def slopes(net: nn.Module, growth: Any) -> None:
    parameters = {n: p.detach() for n, p in net.named_parameters()}
    grad(lambda p: functional_call(net, p, (X,)).square().mean())(parameters)


def per_example(net: nn.Module, growth: Any) -> None:
    parameters = {n: p.detach() for n, p in net.named_parameters()}
    vmap(grad(lambda p, x: functional_call(net, p, (x,)).square().mean()), (None, 0))(parameters, X)


def moved(*dtypes: torch.dtype) -> Handling:
    def handle(net: nn.Module, growth: Any) -> None:
        for dtype in dtypes:
            net.to(dtype)
            net(X.to(dtype))

    return handle


def parametrised(path: str, for_good: bool) -> Handling:
    def handle(net: nn.Module, growth: Any) -> None:
        layer, said = net.get_submodule(path), net(X).detach()
        parametrize.register_parametrization(layer, "weight", nn.Identity())
        assert torch.equal(net(X).detach(), said), "another output"
        if not for_good:
            parametrize.remove_parametrizations(layer, "weight")
            assert torch.equal(net(X).detach(), said), "another output"

    return handle


def begun_anew(net: nn.Module, growth: Any) -> None:
    def draw(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    net.apply(draw)
    net(X)


def watched(net: nn.Module, growth: Any) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    net(X)
    handle.remove()


def evaluated(net: nn.Module, growth: Any) -> None:
    net.eval()
    with torch.inference_mode():
        net(X)
    net.train()


def twice_derived(net: nn.Module, growth: Any) -> None:
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    slope.square().sum().backward()
    net.zero_grad()


def jacobian(net: nn.Module, growth: Any) -> None:
    torch.func.jacrev(net)(X[0])
    torch.func.jvp(net, (X,), (torch.ones_like(X),))


def into_plain(net: nn.Module, growth: Any) -> None:
    """A state goes into a plain model only where that says the same."""
    plain = copy.deepcopy(net)
    for module in plain.modules():
        if "_esper_seam" in vars(module) and not hasattr(plain, "grown"):
            core = vars(module)["_esper_seam"][1]
            module.__class__ = type(core)
            del vars(module)["_esper_seam"]
    try:
        plain.load_state_dict(net.state_dict())
    except RuntimeError as error:
        if "_esper_seed" not in str(error):
            raise
        return
    same(net, plain)


def frozen(net: nn.Module, growth: Any) -> None:
    net.requires_grad_(False)
    net(X)
    net.requires_grad_(True)


def checkpointed(net: nn.Module, growth: Any) -> None:
    x = X.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False).sum().backward()
    net.zero_grad()


def autocast(net: nn.Module, growth: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        net(X).sum().backward()
    net.zero_grad()


def shown(net: nn.Module, growth: Any) -> None:
    assert "Linear" in repr(net)
    assert str(growth)
    assert growth.report() is not None


def grown_state(net: nn.Module, growth: Any) -> None:
    torch.save(growth.state_dict(), io.BytesIO())


def shared(net: nn.Module, growth: Any) -> None:
    net.share_memory()
    net(X)


def averaged(net: nn.Module, growth: Any) -> None:
    average = torch.optim.swa_utils.AveragedModel(net)
    average.update_parameters(net)
    average(X)


def once_more(net: nn.Module, growth: Any) -> None:
    cross_entropy(net, (X, torch.tensor([0, 1, 2]))).backward()
    net.zero_grad(set_to_none=False)


def pruned(net: nn.Module, growth: Any) -> None:
    layer = next(m for m in net.modules() if isinstance(m, nn.Linear))
    nn.utils.prune.identity(layer, "weight")
    net(X)
    nn.utils.prune.remove(layer, "weight")


def vector(net: nn.Module, growth: Any) -> None:
    flat = nn.utils.parameters_to_vector(net.parameters()).detach()
    nn.utils.vector_to_parameters(flat.clone(), net.parameters())
    net(X)


def half_run(net: nn.Module, growth: Any) -> None:
    """A pass that raises in the middle."""

    def stop(*_: Any) -> None:
        raise ZeroDivisionError

    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    handle = last.register_forward_pre_hook(stop)
    try:
        net(X)
    except ZeroDivisionError:
        handle.remove()
    net(X)


def kept_graph(net: nn.Module, growth: Any) -> None:
    growth.kept = net(X).sum()


def odd_input(net: nn.Module, growth: Any) -> None:
    with suppress(RuntimeError):
        net(torch.zeros(3, 7))
    net(X)
    net(X[:0])
    net(X[0])


def nan_input(net: nn.Module, growth: Any) -> None:
    net(X * float("nan"))


def copied(net: nn.Module, growth: Any) -> None:
    same(copy.deepcopy(net), net)


def copied_twice(net: nn.Module, growth: Any) -> None:
    same(copy.deepcopy(copy.deepcopy(net)), net)


def shallow(net: nn.Module, growth: Any) -> None:
    same(copy.copy(net), net)


def pickled(net: nn.Module, growth: Any) -> None:
    same(pickle.loads(pickle.dumps(net)), net)


def stored(net: nn.Module, growth: Any) -> None:
    same(saved(net), net)


def ends(net: nn.Module) -> tuple[str, str]:
    """Name the first and the last layer."""
    found = [n for n, m in net.named_modules() if type(m).__name__ == "Linear" and not n.startswith("grown")]
    return found[0], found[-1]


HOOKS = (
    "register_forward_hook register_forward_pre_hook register_full_backward_hook "
    "register_full_backward_pre_hook register_state_dict_pre_hook register_load_state_dict_post_hook"
).split()


def handlings(net: nn.Module) -> dict[str, Handling]:
    """List all of them for a model."""
    plain = [
        copied, copied_twice, shallow, pickled, stored, put_back, into_plain, trained_copy, traced, scripted,
        symbolic, compiled, mapped, ensembled, slopes, per_example, jacobian, twice_derived, begun_anew,
        watched, evaluated, frozen, checkpointed, autocast, shown, grown_state, shared, averaged, once_more,
        pruned, vector, half_run, kept_graph, odd_input, nan_input,
    ]  # fmt: skip
    found: dict[str, Handling] = {one.__name__: one for one in plain}
    found |= {"exported": exported(False), "exported strictly": exported(True)}
    found |= {"there and back": moved(torch.float64, torch.float32)}

    for path in ends(net):
        found[f"parametrised for a while at {path}"] = parametrised(path, False)
        found[f"parametrised at {path}"] = parametrised(path, True)
        for kind in HOOKS[:4]:
            found[f"{kind} at {path}"] = hooked(kind, path)
    return found
