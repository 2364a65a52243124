"""How a host is compiled, and what growth owes to that: ``none``, ``regional`` or ``whole``.

Dynamo guards on the classes, attributes and shapes it has seen. A seam changes a class, a widening a shape,
so each costs a graph where the changed module is part of one. Counted (docs/compile.md): a new α costs none,
because it is a tensor filled in place; a seed that wakes costs one in a host compiled as a whole and none in
a regional one, whose region steps aside for the while; a cull costs none, because the plain module fits its
old graph again; a widening costs one.

Torch's compiler is reached through attributes of ``torch`` that load on first use: it takes a second to
import, and a host that is not compiled never needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import CodeType
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from esper.errors import CompileError, SiteError
from esper.kasmina.seeds import compiler_settings

Kind = Literal["none", "regional", "whole"]
Compiled: TypeAlias = Callable[..., object]  # what torch.compile made

WRAPPED = "_orig_mod"  # where torch.compile keeps the module it was given
# Graphs a code object must still have room for: awake and wider, in training, evaluation and a last batch.
SPARE = 6
LIMIT = "recompile_limit"
SEEN = "2.12"  # from this torch on a model compiled as a whole sees that a seam has come
CHECKPOINTED = "skip_fwd_side_effects_in_bwd_under_checkpoint"  # a setting of torch's


@dataclass(frozen=True)
class CompilePolicy:
    """What of a host is compiled.

    Attributes:
        kind: "none"; "regional": blocks by themselves, joined by eager code; "whole": one call for all.
        host: The module inside, which grows; the compiled object the user holds stays valid.
        regions: Compiled blocks by name, as ``torch.compile`` or ``Module.compile`` left them.
        calls: The compiled callable of every region, or under "" that of the whole.
        aside: Number of times each region was asked to stand aside, by name.
    """

    kind: Kind
    host: nn.Module
    regions: dict[str, nn.Module] = field(default_factory=dict)
    calls: dict[str, Compiled] = field(default_factory=dict)
    aside: dict[str, int] = field(default_factory=dict)

    def uncompiled(self) -> AbstractContextManager[object]:
        """Let what runs inside run eagerly: surveys, races, gates and recordings see the host's own calls."""
        return nullcontext() if self.kind == "none" else uncompiled()

    def stand_aside(self, modules: Iterable[nn.Module]) -> Callable[[], None]:
        """Run the regions around some modules eagerly until the returned function is called.

        A seam inside a region would recompile it, and one at its border would be passed by: the compiled
        callable is bound to the class from before the seam. Both ways cost no graph; the old one still fits
        when the region steps back.
        """
        names = self.around(modules)
        for name in names:
            self.aside[name] = self.aside.get(name, 0) + 1
            _set_call(self.regions[name], None)
        return partial(self.step_back, names)

    def step_back(self, names: Iterable[str]) -> None:
        """Give regions their compiled callable back, once nobody wants them aside."""
        for name in names:
            self.aside[name] -= 1
            if not self.aside[name]:
                del self.aside[name]
                _set_call(self.regions[name], self.calls[name])

    def around(self, modules: Iterable[nn.Module]) -> list[str]:
        """Name the regions that hold any of the modules."""
        wanted = {id(module) for module in modules}
        return [n for n, region in self.regions.items() if any(id(m) in wanted for m in region.modules())]

    def after_commit(self, modules: Iterable[nn.Module]) -> str:
        """Let go of graphs that no longer fit and make room for those that come.

        Call it after a widening was carried out. A code object keeps eight graphs (torch's
        ``recompile_limit``); past that it runs eagerly for ever, with a line in the log (counted: the
        seventh widening of a whole model was the last one compiled).

        Args:
            modules: The layers that became wider.

        Returns:
            What will be recompiled and why; "" where nothing is.
        """
        if self.kind == "whole":
            dropped = sum(_drop(code) for code in self.codes())
            self.make_room()
            return f"the host has new shapes; dropped {dropped} of its graphs, one per mode is compiled anew"
        touched = self.around(modules)
        for name in touched:
            code = _code(_inner(self.regions[name]).forward)
            if code is not None and self.users(code) == 1:
                _drop(code)  # blocks of one class share graphs: those of the others still fit
        self.make_room()
        return f"{', '.join(touched)} has new shapes; one graph per mode is compiled" if touched else ""

    def users(self, code: CodeType) -> int:
        """Count the regions that run a code object."""
        return sum(_code(_inner(region).forward) is code for region in self.regions.values())

    def make_room(self) -> str:
        """Raise torch's limit of graphs per code object before it is reached; call it before a seed wakes.

        Twelve blocks of one class share one code object, so twelve different widths are twelve graphs there.
        The limit is a setting of the whole process, put back by :meth:`leave`; a ``recompile_limit`` given to
        ``torch.compile`` itself stands above it and is not touched.

        Returns:
            What was changed; "" where there was room.
        """
        if self.kind == "none":
            return ""
        # A seam notes what passes. Under activation checkpointing Dynamo takes a note for unsafe and skips
        # the frame, silently and for ever (counted). The note need not be repeated in the backward pass.
        if hasattr(torch._dynamo.config, CHECKPOINTED):
            compiler_settings.change(CHECKPOINTED, True, self)
        most = max((len(_graphs(code)) for code in self.codes()), default=0)
        if most + SPARE <= compiler_settings.original(LIMIT):
            return ""
        limit = torch._dynamo.config.recompile_limit  # another run may have raised it already
        raised = limit if most + SPARE <= limit else max(2 * limit, most + SPARE)
        compiler_settings.change(LIMIT, raised, self)
        return "" if raised == limit else f"{most} of {limit} graphs are in use; the limit is {raised} now"

    def leave(self) -> str:
        """Put torch's settings back, and let graphs go that would not leave room under its own limit.

        Returns:
            Why the limit stays raised; "" where it does not.
        """
        if self.kind == "none":
            return ""
        compiler_settings.leave(CHECKPOINTED, id(self))
        limit = compiler_settings.original(LIMIT)
        codes = [code for code in self.codes() if len(_graphs(code)) + SPARE > limit]
        crowded = max((self.users(code) for code in codes), default=0)
        if crowded + SPARE > limit:  # as long as the host lives, which outlives the run
            compiler_settings.change(LIMIT, torch._dynamo.config.recompile_limit, self.host)
            compiler_settings.leave(LIMIT, id(self))
            return f"{crowded} blocks share one code object, and each width is a graph of it"
        for code in codes:
            _drop(code)
        compiler_settings.leave(LIMIT, id(self))
        return ""

    def codes(self) -> list[CodeType]:
        """List the code objects that may hold graphs of this host, the rests of broken frames included."""
        found = [_code(m.forward) for m in self.host.modules()]
        found += [_code(call) for call in self.calls.values()]
        codes = list(dict.fromkeys(code for code in found if code is not None))
        for code in codes:  # grows while it is read
            resumed = torch._dynamo.resume_execution.ContinueExecutionCache.cache.get(code) or {}
            codes.extend(rest for rest in resumed.values() if rest not in codes)
        return codes


def detect(model: nn.Module, loss_fn: Callable[..., object] | None = None) -> CompilePolicy:
    """Find out how a model was compiled by its user.

    Args:
        model: Plain, compiled with ``torch.compile(model)`` or ``model.compile()``, or with compiled blocks.
        loss_fn: The loss function, which may be compiled as well.

    Raises:
        SiteError: It records CUDA graphs.
    """
    host = _inner(model)
    found = ((name, _call(module)) for name, module in host.named_modules())
    calls = {name: call for name, call in found if call is not None}
    for compiled in (model, *(host.get_submodule(name) for name in calls)):
        _refuse_cuda_graphs(compiled)
    whole = _call(model)
    if model is not host or "" in calls:
        return CompilePolicy("whole", host, calls={"": whole} if whole is not None else {})
    if loss_fn is not None and hasattr(loss_fn, "_torchdynamo_orig_callable"):
        return CompilePolicy("whole", host, calls={"": loss_fn})
    regions = {name: host.get_submodule(name) for name in calls}
    return CompilePolicy("regional" if regions else "none", host, regions, calls)


def refuse_unseen_seeds(policy: CompilePolicy) -> None:
    """Refuse to let seeds wake in a host whose graph would pass them by.

    Raises:
        SiteError: It is compiled as a whole, by a torch whose graphs do not look for seams (counted: a kernel
            that gave NaN was never called).
    """
    if policy.kind == "whole" and torch.__version__ < SEEN:
        raise SiteError(
            f"a model compiled as a whole does not see a seed that wakes in it before torch {SEEN}, and this "
            f"is {torch.__version__}; compile its blocks instead, grow with growth='early', which needs no "
            f"seeds, or install torch>={SEEN}"
        )


def apply(
    model: nn.Module,
    kind: Kind,
    backend: str | Callable[..., object] = "inductor",
    *,
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    options: dict[str, str | int | bool | Callable[..., object]] | None = None,
) -> nn.Module:
    """Compile a model so that it can grow.

    Args:
        model: Not compiled yet.
        kind: "none": as it is. "whole": one call; best steady speed, a growth recompiles all of it.
            "regional": the outermost blocks of the user's own classes, each compiled in place; a growth
            recompiles one block. Torch's own containers and layers between them stay eager, because
            ``compile()`` does nothing on them (measured: 0 graphs, silently).
        backend: Backend of ``torch.compile``.
        mode: Preset of the backend's options.
        dynamic: True where sizes are taken for unknown; None: once they have changed.
        fullgraph: True where a broken graph is an error.
        options: Options of the backend, by name.

    Returns:
        What to train and to give to ``esper.grow``.

    Raises:
        CompileError: It is compiled already, or has no block for "regional".
        SiteError: The options ask for CUDA graphs.
    """
    if detect(model).kind != "none":
        raise CompileError("the model is compiled already; give the plain module, or leave the policy out")
    if kind == "none":
        return model
    if kind == "whole":
        compiled = torch.compile(
            model, backend=backend, mode=mode, dynamic=dynamic, fullgraph=fullgraph, options=options
        )
        assert isinstance(compiled, nn.Module)
        _refuse_cuda_graphs(compiled)
        return compiled
    found = blocks(model)
    if not found:
        raise CompileError(
            f"{type(model).__name__} has no block of its own class below it, only layers of torch.nn; "
            'use the policy "whole"'
        )
    for block in found.values():
        block.compile(backend=backend, mode=mode, dynamic=dynamic, fullgraph=fullgraph, options=options)
    try:
        detect(model)
    except SiteError:
        for block in found.values():
            block._compiled_call_impl = None
        raise
    return model


def blocks(model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Return the outermost modules with parameters, below a model, whose class is not one of torch's."""
    found: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        path = f"{prefix}.{name}".lstrip(".")
        if type(child).__module__.startswith("torch.nn."):
            found |= blocks(child, path)
        elif next(child.parameters(), None) is not None:
            found[path] = child
    return found


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run whatever is compiled eagerly: models, blocks, loss functions, and what they close over.

    Setting compiled callables aside would miss the last two. It holds for the whole process: another thread
    that compiles meanwhile would run eagerly too, so Tezzeret compiles in processes. Costs 7 µs.
    """
    if "torch._dynamo" not in sys.modules:  # nothing was ever compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def blended(y: Tensor, f: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Return y + α·f where f is finite, otherwise y; and whether it is, as a 0-dim tensor.

    For a graph, which cannot ask: ``bool(tensor)`` breaks it. The kernel's own gradients may be non-finite
    then, the host's are not.
    """
    finite = torch.isfinite(f.detach().sum(dtype=torch.float32))
    kept = torch.where(finite, f.to(y.dtype), torch.zeros((), dtype=y.dtype, device=y.device))
    return torch.addcmul(y, alpha.to(y.dtype), kept), finite


# -- torch's own places -------------------------------------------------------------------------------------


def _inner(model: nn.Module) -> nn.Module:
    while WRAPPED in model._modules:  # by name, because the class lives in a slow import
        inside = model._modules[WRAPPED]
        assert inside is not None
        model = inside
    return model


def _call(module: nn.Module) -> Compiled | None:
    """Return a module's compiled callable."""
    if WRAPPED in module._modules:
        return module.__dict__.get("forward")
    return module.__dict__.get("_compiled_call_impl")


def _set_call(region: nn.Module, call: Compiled | None) -> None:
    if WRAPPED in region._modules:
        region.__dict__["forward"] = partial(_run, _inner(region)) if call is None else call
    else:
        region.__dict__["_compiled_call_impl"] = call


def _run(module: nn.Module, *args: object, **kwargs: object) -> object:
    return module(*args, **kwargs)  # looked up at every call: a seam may come later


def _code(function: object) -> CodeType | None:
    function = getattr(function, "_torchdynamo_orig_callable", function)
    return getattr(function, "__code__", None)


def _graphs(code: CodeType) -> Sequence[object]:
    return torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code)


def _drop(code: CodeType) -> int:
    count = len(_graphs(code))
    if count:
        torch._dynamo.eval_frame.reset_code(code)
    return count


def _refuse_cuda_graphs(module: nn.Module) -> None:
    ask = getattr(module if WRAPPED in module._modules else _call(module), "get_compiler_config", None)
    settings = ask() if ask is not None else None
    if settings and settings.get("triton.cudagraphs"):
        raise SiteError(
            "the model is compiled with CUDA graphs, which record addresses of weights and overwrite what a "
            'seed keeps between steps, and growth needs both; compile with mode="default" or '
            '"max-autotune-no-cudagraphs"'
        )
