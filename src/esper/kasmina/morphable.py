"""``MorphableModel``: a host with places to grow, untouched bit for bit while every seed is dormant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from esper.arguments import flag, texts, whole
from esper.batches.cropped import trials
from esper.batches.examples import count_examples, refuse_layouts
from esper.batches.layout import Batch
from esper.contracts import Refusal
from esper.errors import EsperError, ProbeError, SiteError
from esper.kasmina.branches.blocks import find_blocks
from esper.kasmina.branches.choice import chosen
from esper.kasmina.depth.stack import Stack
from esper.kasmina.depth.stacks import find_stacks
from esper.kasmina.proving.proving import Pass, Proof
from esper.kasmina.recording.first import at_first
from esper.kasmina.recording.flops import FlopMeter
from esper.kasmina.recording.recorder import tensors
from esper.kasmina.seeds.compiling import CompilePolicy, detect
from esper.kasmina.seeds.layer import KasminaLayer
from esper.kasmina.seeds.state import KasminaStateLayout
from esper.kasmina.seeds.streams import StreamPool
from esper.kasmina.sites.reasons import left_behind
from esper.kasmina.sites.selecting import Sites, refuse_selectors
from esper.kasmina.sites.sites import find_pairs, racing, reachable, select, uncoded
from esper.kasmina.sites.uncalled import not_read_elsewhere
from esper.kasmina.widths.layers import features
from esper.kasmina.widths.places import Place, WidenPlace
from esper.printable import shortened
from esper.surgery.isolation.acting import is_seed
from esper.surgery.isolation.contexts import examining, untouched
from esper.surgery.isolation.global_draws import forgetting

PREFIX = "_esper."
MOST_SEEDS = 1024  # per site: every one has a row of the layout
MOST_SAID = 2000  # characters of what the user's model raises
# What a model raises that does not fit its inputs; an exception of another kind is the user's own affair.
MISTAKES = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
)


class MorphableModel(nn.Module):
    """Calls the host; keeps the seeds beside it.

    ``state_dict`` has the host's keys verbatim and, only while a seed is awake, keys under ``_esper.``, so a
    checkpoint of the plain model loads strictly.

    Args:
        host: The user's model, neither copied nor changed.
        call: Function that calls the host once on example data; used to find sites, never kept.
        examples: Examples in that run, for FLOPs per example.
        sites: Which places to use, see :func:`esper.kasmina.sites.sites.select`.
        seeds_per_site: Slots per site.
        blueprints: Names of what may grow, see :func:`esper.kasmina.branches.choice.chosen`.
        policy: Way the host is compiled; None: not at all.
        smoothing: Weight of a new measurement of a kernel's vitals.
        sampling: Steps between such measurements.
        deepen: True where stacks of blocks are places too; a race cannot take them.
        raced: True to leave out what a race cannot take: layers with several consumers, or called several
            times in one pass.
        trials: Call it on fewer examples, and on such of other sizes; growth is proven there, too.
    """

    def __init__(
        self,
        host: nn.Module,
        call: Pass,
        examples: int,
        sites: Sites = "auto",
        seeds_per_site: int = 4,
        blueprints: Sequence[str] = ("auto",),
        policy: CompilePolicy | None = None,
        smoothing: float = 0.1,
        sampling: int = 10,
        deepen: bool = False,
        raced: bool = False,
        trials: tuple[Sequence[Pass], Sequence[Pass]] = ((), ()),
    ) -> None:
        super().__init__()
        run = lambda: call(host)  # noqa: E731
        self.host = host
        self.policy = policy or CompilePolicy("none", host)
        self.seeds_per_site = seeds_per_site
        self.examples, self.blueprints, self.raced = examples, tuple(blueprints), raced
        found, self.refusals = self.proven(*self.find(run), Proof(host, [call, *trials[0]], trials[1]))
        if {"auto", "widen"} & set(self.blueprints):
            self.refusals = [*self.refusals, *left_behind(host, found)]
        found, codes = uncoded(found, sites)
        self.refusals = [*self.refusals, *codes]
        if sites == "auto" and deepen:  # a run is to follow, whose batches may go other ways
            found, read = not_read_elsewhere(host, found, self.refusals)
            self.refusals = [*self.refusals, *read]
        if deepen and {"auto", "deepen"} & set(self.blueprints):
            with untouched(host, seed=0, gather=True):
                stacks, unfit = find_stacks(host, run, examples)
            found, self.refusals = [*found, *stacks], [*self.refusals, *unfit]
        self.places: dict[str, Place] = {p.site.name: p for p in select(found, self.refusals, sites)}
        self.names = list(self.places)  # of all sites ever; one that growth elsewhere closed keeps its seeds
        self.flops = 0  # forward, per example
        self.meter(run)
        self.layout = KasminaStateLayout(seeds_per_site * len(self.places), smoothing, sampling)
        self.layout.to(next(host.parameters()).device)
        self.pool = StreamPool(enabled=False)
        self.layers = nn.ModuleDict()  # one KasminaLayer per site with an awake seed
        self.register_state_dict_post_hook(_host_keys_verbatim)
        self.register_load_state_dict_pre_hook(_host_keys_prefixed)

    def find(self, run: Callable[[], object]) -> tuple[list[Place], list[Refusal]]:
        """Look at the host as it is: every place with what fits there, every other with the reason."""
        found: list[Place] = []
        refusals: list[Refusal] = []
        with untouched(self.host, seed=0, gather=True):
            if {"auto", "widen"} & set(self.blueprints):
                pairs, unfit = find_pairs(self.host, run, self.examples)
                kept, unreachable = reachable(self.host, pairs, run)
                kept, barred = racing(kept) if self.raced else (kept, list[Refusal]())
                found.extend(kept)
                refusals += [*unfit, *unreachable, *barred]
            automatic = "auto" in self.blueprints and bool(found)  # the catalogue is not even read (3 ms)
            graphs = chosen([name for name in self.blueprints if name != "auto" or not automatic])
            if graphs and not automatic:
                blocks, unfit = find_blocks(self.host, run, self.examples, graphs)
                found, refusals = [*found, *blocks], [*refusals, *unfit]
        return found, refusals

    def proven(
        self, found: Sequence[Place], refusals: Sequence[Refusal], proof: Proof
    ) -> tuple[list[Place], list[Refusal]]:
        """Keep the widenings that come out exact on copies; the others are refused with the reason."""
        pairs = {place.site.name: place for place in found if isinstance(place, WidenPlace)}
        if not pairs:
            return list(found), list(refusals)
        why = proof.unproven(pairs)
        barred = [Refusal(pairs[name].site.entry, reason) for name, reason in why.items()]
        return [place for place in found if place.site.name not in why], [*refusals, *barred]

    def meter(self, run: Callable[[], object]) -> None:
        """Count the host's forward FLOPs per example."""
        with examining(self.host, seed=0), FlopMeter() as meter:
            run()
        self.flops = meter.total // max(self.examples, 1)

    @property
    def pairs(self) -> dict[str, WidenPlace]:
        """The places that widen the user's own layers."""
        return {name: place for name, place in self.places.items() if isinstance(place, WidenPlace)}

    @property
    def stacks(self) -> dict[str, Stack]:
        """The places that get one more block."""
        return {name: place for name, place in self.places.items() if isinstance(place, Stack)}

    def forward(self, *args: object, **kwargs: object) -> object:
        """Call the host."""
        return self.host(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Show the host's own attributes and methods."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in {"host", "_modules"} or "host" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.host, name)

    def seeds(self, site: str) -> range:
        """Return the rows of a site's seeds in the layout."""
        first = self.names.index(site) * self.seeds_per_site
        return range(first, first + self.seeds_per_site)

    def site_of(self, seed: int) -> str:
        """Name the site a seed belongs to."""
        return self.names[seed // self.seeds_per_site]

    def parameter_count(self) -> int:
        """Count the host's parameters, each once."""
        return sum(parameter.numel() for parameter in self.host.parameters())

    def layer(self, site: str, on_fault: Callable[[str], None], slot: int = 0) -> KasminaLayer:
        """Open the seams of a site for the seed in one of its slots."""
        layer = KasminaLayer(self.places[site], on_fault, self.pool)
        if self.policy.kind != "whole":  # there an open seam is a graph: it opens when the kernel is exposed
            layer.open()
            layer.closers.append(self.policy.stand_aside(self.places[site].ends()))
        self.layers[slug(site, slot)] = layer
        return layer

    def awake(self, site: str, slot: int = 0) -> KasminaLayer | None:
        """Return the layer of the seed that is awake in a slot of a site; None where it sleeps."""
        name = slug(site, slot)
        layer = self.layers[name] if name in self.layers else None  # noqa: SIM401 - has no get
        assert layer is None or isinstance(layer, KasminaLayer)
        return layer

    def release(self, site: str, slot: int = 0) -> None:
        """Close the seams of a slot and drop whatever was awake there."""
        layer = self.awake(site, slot)
        if layer is not None:
            layer.close()
            del self.layers[slug(site, slot)]

    def refresh(self, run: Callable[[], object]) -> None:
        """Bring the facts of all sites up to date after one of them has grown.

        Pairs and stacks know their own modules. Where blueprints are in play the host is looked at again:
        what grew may have changed a shape, or stand between two layers, and such places are closed from now
        on.
        """
        stacks: list[Place] = [stack.refreshed() for stack in self.stacks.values()]
        found: list[Place] = [pair.refreshed() for pair in self.pairs.values()]
        if len(found) + len(stacks) < len(self.places):
            found, self.refusals = self.find(run)
        self.places = {p.site.name: p for p in (*found, *stacks) if p.site.name in self.names}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MorphableModel:
        """Move everything, then hand the awake layers the rows of the moved layout."""
        super()._apply(fn, recurse)
        for site in self.names:
            for slot, seed in enumerate(self.seeds(site)):
                layer = self.awake(site, slot)
                if layer is not None and layer.alpha is not None:
                    layer.alpha = self.layout.alpha[seed]
        return self


def slug(site: str, slot: int = 0) -> str:
    """Write a site's name as a module name, and behind it the number of any slot but the first."""
    name = site.replace(".", "_").replace(">", "__").replace(":", "_to_").replace("+", "__")
    return f"{name}@{slot}" if slot else name


def _host_keys_verbatim(module: nn.Module, state: dict[str, object], prefix: str, metadata: object) -> None:
    assert isinstance(module, MorphableModel)
    awake = len(module.layers) > 0
    for key in list(state):
        rest = key[len(prefix) :]
        if is_seed(rest):  # it is among this model's own layers
            del state[key]
        elif rest.startswith("host."):
            state[prefix + rest[5:]] = state.pop(key)
        elif awake:
            state[prefix + PREFIX + rest] = state.pop(key)
        else:
            del state[key]


def _host_keys_prefixed(module: nn.Module, state: dict[str, object], prefix: str, *rest: object) -> None:
    assert isinstance(module, MorphableModel)
    own = {name for name, _ in module.layout.named_buffers()}
    for key in list(state):
        name = key[len(prefix) :]
        if name.startswith(PREFIX):
            state[prefix + name[len(PREFIX) :]] = state.pop(key)
        elif not name.startswith("host.") and key.startswith(prefix):
            state[f"{prefix}host.{name}"] = state.pop(key)
    for name in own:  # a plain checkpoint says nothing of seeds: they stay as they are
        state.setdefault(f"{prefix}layout.{name}", getattr(module.layout, name))


def wrap(
    model: nn.Module,
    example_inputs: object,
    *,
    sites: Sites = "auto",
    seeds_per_site: int = 4,
    blueprints: Sequence[str] = ("auto",),
    raced: bool = False,
    deepen: bool = False,
) -> MorphableModel:
    """Find the places where a model can grow, and install nothing.

    Args:
        model: An ``nn.Module``; it is used as it is, not copied.
        example_inputs: Arguments the model is called with: a tensor, a tuple of positional or a mapping of
            keyword arguments. Axis 0 of the first tensor is the batch.
        sites: "auto", or which places: globs, regular expressions, layer types, or a mapping with "include"
            and "exclude".
        seeds_per_site: Slots per place.
        blueprints: Names of what may grow: "widen", names of the catalogue (``esper blueprints list``), or
            paths of JSON files. "auto" widens, and offers the catalogue to a model in which
            nothing can be widened.
        raced: True to leave out what a race (growth="incubate") cannot take: layers that several others
            read, and layers that one pass calls several times.
        deepen: True where stacks of blocks, which no race can take, are places too.

    Raises:
        SiteError: The model has no place to grow, or none of those asked for.
        ConfigError: An argument is of another kind or out of range.
        ProbeError: The model does not run on the example inputs.
    """
    refuse_arguments(model, seeds_per_site, blueprints, raced, deepen)
    refuse_selectors(sites)
    args: tuple[object, ...] = ()
    kwargs: dict[str, object] = {}
    if isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    else:
        args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    given = tensors((args, kwargs))
    if not given:
        raise ProbeError("example_inputs holds no tensor; give what the model is called with")
    if not given[0].is_nested and not given[0].dim():
        raise ProbeError("the first tensor of example_inputs is a number; examples lie along its axis 0")
    refuse_layouts((args, kwargs))
    try:
        policy = detect(model)
        host = policy.host
        few, others = trials((args, kwargs), features(host))
        with policy.uncompiled(), at_first(host):
            return MorphableModel(
                host,
                called(args, kwargs),
                count_examples((args, kwargs)),
                sites,
                seeds_per_site,
                blueprints,
                policy=policy,
                raced=raced,
                deepen=deepen,
                trials=(every(few), every(others)),
            )
    except EsperError:
        raise
    except MISTAKES as error:
        said = shortened(f"{type(error).__name__}: {error}", MOST_SAID)
        raise ProbeError(f"the model does not run on example_inputs: {said}") from error
    finally:
        forgetting(model)()  # no more passes are made


def refuse_arguments(
    model: object, seeds_per_site: object, blueprints: object, raced: object, deepen: object
) -> None:
    """Refuse what is of another kind than ``wrap`` takes.

    Raises:
        SiteError: The model is none that can be wrapped.
        ConfigError: Another argument.
    """
    if isinstance(model, MorphableModel):
        raise SiteError("this model is wrapped already; esper.unwrap(m) gives the host back")
    if not isinstance(model, nn.Module):
        raise SiteError(f"a {type(model).__name__} cannot grow; an nn.Module is needed")
    whole("seeds_per_site", seeds_per_site, least=1, most=MOST_SEEDS)
    texts("blueprints", blueprints, "names, or paths of JSON files: 'auto', 'widen', 'residual_mlp' …")
    flag("raced", raced)
    flag("deepen", deepen)


def called(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Pass:
    """Return what calls a model so."""
    return lambda model: model(*args, **kwargs)


def every(inputs: Iterable[Batch]) -> list[Pass]:
    """Return what calls a model with each of some pairs of positional and keyword arguments."""
    return [called(*pair) for pair in inputs if isinstance(pair, tuple)]


def unwrap(model: MorphableModel) -> nn.Module:
    """Return the host: the original object with what grew in it, without the seeds still awake.

    Raises:
        SiteError: ``model`` is not wrapped.
    """
    if not isinstance(model, MorphableModel):
        raise SiteError(f"a {type(model).__name__} is not wrapped; unwrap takes what esper.wrap returned")
    for site in model.names:
        for slot in range(model.seeds_per_site):
            model.release(site, slot)
    return model.host
