"""``MorphableModel``: a host with places to grow, untouched bit for bit while every seed is dormant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from esper.contracts import Refusal, Stage
from esper.errors import ProbeError, SiteError
from esper.kasmina.flops import FlopMeter
from esper.kasmina.isolation import evaluating, untouched
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.pairs import Pair
from esper.kasmina.recorder import tensors
from esper.kasmina.sites import Sites, find_pairs, reachable, select
from esper.kasmina.state import KasminaStateLayout

PREFIX = "_esper."


class MorphableModel(nn.Module):
    """Calls the host; keeps the seeds beside it.

    ``state_dict`` has the host's keys verbatim and, only while a seed is awake, keys under ``_esper.``, so a
    checkpoint of the plain model loads strictly.

    Args:
        host: The user's model, neither copied nor changed.
        run: Calls the host once on example data; used to find sites, never kept.
        examples: Examples in that run, for FLOPs per example.
        sites: Which places to use, see :func:`esper.kasmina.sites.select`.
        seeds_per_site: Slots per site.
    """

    def __init__(
        self,
        host: nn.Module,
        run: Callable[[], Any],
        examples: int,
        sites: Sites = "auto",
        seeds_per_site: int = 4,
    ) -> None:
        super().__init__()
        self.host = host
        self.seeds_per_site = seeds_per_site
        with untouched(host, seed=0, gather=True):
            pairs, refusals = find_pairs(host, run)
            pairs, unreachable = reachable(host, pairs, run)
        self.refusals: list[Refusal] = [*refusals, *unreachable]
        self.pairs: dict[str, Pair] = {pair.site.name: pair for pair in select(pairs, self.refusals, sites)}
        with evaluating(host), untouched(host, seed=0), FlopMeter() as meter:
            run()
        self.flops = meter.total // max(examples, 1)  # forward, per example
        self.layout = KasminaStateLayout(seeds_per_site * len(self.pairs))
        self.layout.to(next(host.parameters()).device)
        self.layers = nn.ModuleDict()  # one KasminaLayer per site with an awake seed
        self.register_state_dict_post_hook(_host_keys_verbatim)
        self.register_load_state_dict_pre_hook(_host_keys_prefixed)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
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
        first = list(self.pairs).index(site) * self.seeds_per_site
        return range(first, first + self.seeds_per_site)

    def site_of(self, seed: int) -> str:
        """Name the site a seed belongs to."""
        return list(self.pairs)[seed // self.seeds_per_site]

    def parameter_count(self) -> int:
        """Count the host's parameters, each once."""
        return sum(parameter.numel() for parameter in self.host.parameters())

    def layer(self, site: str, on_fault: Callable[[str], None]) -> KasminaLayer:
        """Open the seams of a site."""
        layer = KasminaLayer(self.pairs[site], on_fault)
        layer.open()
        self.layers[slug(site)] = layer
        return layer

    def awake(self, site: str) -> KasminaLayer | None:
        """Return the layer of a site with an awake seed."""
        layer = self.layers[slug(site)] if slug(site) in self.layers else None  # noqa: SIM401 - has no get
        assert layer is None or isinstance(layer, KasminaLayer)
        return layer

    def release(self, site: str) -> None:
        """Close a site's seams and drop whatever was awake there."""
        layer = self.awake(site)
        if layer is not None:
            layer.close()
            del self.layers[slug(site)]

    def refresh(self) -> None:
        """Bring the facts of all sites up to date after one of them has been widened."""
        self.pairs = {name: pair.refreshed() for name, pair in self.pairs.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MorphableModel:
        """Move everything, then hand the awake layers the rows of the moved layout."""
        super()._apply(fn, recurse)
        for site in self.pairs:
            layer = self.awake(site)
            if layer is not None and layer.alpha is not None:
                awake = next(s for s in self.seeds(site) if self.layout.stage_of(s) is not Stage.DORMANT)
                layer.alpha = self.layout.alpha[awake]
        return self


def slug(site: str) -> str:
    """Write a site's name as a module name."""
    return site.replace(".", "_").replace(">", "__")


def _host_keys_verbatim(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    assert isinstance(module, MorphableModel)
    awake = len(module.layers) > 0
    for key in list(state):
        rest = key[len(prefix) :]
        if rest.startswith("host."):
            state[prefix + rest[5:]] = state.pop(key)
        elif awake:
            state[prefix + PREFIX + rest] = state.pop(key)
        else:
            del state[key]


def _host_keys_prefixed(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
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
    model: nn.Module, example_inputs: Any, *, sites: Sites = "auto", seeds_per_site: int = 4
) -> MorphableModel:
    """Find the places where a model can grow, and install nothing.

    Args:
        model: Any ``nn.Module``; it is used as it is, not copied.
        example_inputs: What the model is called with: a tensor, a tuple of positional or a mapping of keyword
            arguments. Axis 0 of the first tensor is the batch.
        sites: "auto", or which places: globs, regular expressions, layer types, or a mapping with "include"
            and "exclude".
        seeds_per_site: Slots per place.

    Raises:
        SiteError: The model has no place to grow, or none of those asked for.
        ProbeError: The model does not run on the example inputs.
    """
    if isinstance(model, MorphableModel):
        raise SiteError("this model is wrapped already; esper.unwrap(m) gives the host back")
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    else:
        args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    given = tensors((args, kwargs))
    if not given:
        raise ProbeError("example_inputs holds no tensor; give what the model is called with")
    try:
        return MorphableModel(model, lambda: model(*args, **kwargs), len(given[0]), sites, seeds_per_site)
    except (RuntimeError, TypeError, IndexError) as error:
        if isinstance(error, (SiteError, ProbeError)):
            raise
        raise ProbeError(f"the model does not run on example_inputs: {error}") from error


def unwrap(model: MorphableModel) -> nn.Module:
    """Return the host: the original object, wider where pairs were widened, without the seeds still awake.

    Raises:
        SiteError: ``model`` is not wrapped.
    """
    if not isinstance(model, MorphableModel):
        raise SiteError(f"a {type(model).__name__} is not wrapped; unwrap takes what esper.wrap returned")
    for site in model.pairs:
        model.release(site)
    return model.host
