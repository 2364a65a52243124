"""What may stand between the two layers of a pair: operations that treat every channel alone.

Each step knows three things: how to run on a few new channels, which tensors it needs for them, and which
tensors and attributes of the host grow with it. Everything else is refused, because zero columns in the
consumer would not be enough to keep the output: LayerNorm over the widened axis moves it by 0.58 (measured).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

ELEMENTWISE = frozenset(
    "relu relu_ relu6 gelu silu mish elu elu_ selu selu_ celu leaky_relu leaky_relu_ tanh tanh_ sigmoid "
    "sigmoid_ softplus softsign hardtanh hardtanh_ hardswish hardsigmoid logsigmoid tanhshrink softshrink "
    "hardshrink threshold clamp clamp_ clamp_min clamp_max clip abs exp square sqrt sin cos neg mul mul_ div "
    "div_ add add_ sub sub_ true_divide multiply __mul__ __rmul__ __add__ __radd__ __sub__ __truediv__ "
    "__neg__ __pow__ pow clone contiguous to float bfloat16 half dropout dropout_ alpha_dropout "
    "nan_to_num erf erfc log log1p expm1 sign rsqrt reciprocal atan sinh maximum minimum rsub __rsub__ "
    "__rtruediv__ __rpow__ detach round floor ceil trunc double type".split()
)
SPATIAL = frozenset(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
    "lp_pool1d lp_pool2d interpolate pad dropout1d dropout2d dropout3d feature_dropout feature_alpha_dropout "
    "instance_norm".split()
)
RESHAPE = frozenset({"flatten", "view", "reshape"})


@dataclass(frozen=True)
class Step:
    """A channel-wise operation; the base owns nothing and costs nothing that is counted."""

    label: str

    def fresh(self, units: int) -> dict[str, Tensor]:
        """Make the tensors ``units`` new channels need, on the device and in the dtype of the host's."""
        return {}

    def run(self, x: Tensor, own: Mapping[str, Tensor], training: bool) -> Tensor:
        """Run on new channels only."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Return the host's own tensors, by the names :meth:`run` knows them."""
        return {}

    def grows(self) -> tuple[tuple[str, str], ...]:
        """Name the host's tensors that grow along axis 0, as (own name, host name)."""
        return ()

    def attributes(self, units: int) -> tuple[tuple[str, str, int], ...]:
        """List (module, attribute, new value)."""
        return ()

    def unit_parameters(self) -> int:
        """Count the parameters of one more channel."""
        return 0

    def unit_flops(self, shape: torch.Size) -> int:
        """Count forward FLOPs per example of one more channel; shape is the output's (batch, channels, …)."""
        return 0


@dataclass(frozen=True)
class Replay(Step):
    """A call that owns nothing, repeated as it was recorded."""

    func: Callable[..., Any]
    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = field(default_factory=dict)
    switches: bool = False  # the call's ``training`` flag follows the mode

    def run(self, x: Tensor, own: Mapping[str, Tensor], training: bool) -> Tensor:
        """Make the same call on fewer channels."""
        kwargs = {**self.kwargs, "training": training} if self.switches else self.kwargs
        return self.func(x, *self.args, **kwargs)

    def __reduce__(self) -> tuple[object, ...]:
        """Travel by name: some of torch's functions are closures, which do not pickle."""
        return named_replay, (self.label, self.args, dict(self.kwargs), self.switches)


@dataclass(frozen=True)
class Counted(Replay):
    """A call of a norm without weights, which only knows how many channels it takes."""

    name: str = ""
    module: Any = field(default=None, compare=False)

    def attributes(self, units: int) -> tuple[tuple[str, str, int], ...]:
        """Raise that number: the norm would warn of another."""
        return ((self.name, "num_features", int(self.module.num_features) + units),)


def named_replay(
    label: str, args: tuple[object, ...], kwargs: Mapping[str, object], switches: bool
) -> Replay:
    """Build a replay of a torch function from its name."""
    return Replay(label, function(label), args, kwargs, switches)


@cache
def function(label: str) -> Callable[..., Any]:
    """Find a torch function or method by its name; ``torch.float`` is a dtype, ``Tensor.float`` is meant."""
    found = [getattr(home, label, None) for home in (F, torch, Tensor)]
    return next(func for func in found if callable(func))


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor in the arguments of a call: 0 is the input, i the result of call i."""

    index: int


@dataclass(frozen=True)
class Part:
    """One call of a :class:`Composite`."""

    label: str
    args: tuple[object, ...]
    kwargs: Mapping[str, object]


@dataclass(frozen=True)
class Composite(Step):
    """Elementwise calls that part and meet again, as activations written by hand do: ``x * sigmoid(x)``."""

    parts: tuple[Part, ...]

    def run(self, x: Tensor, own: Mapping[str, Tensor], training: bool) -> Tensor:
        """Make the same calls on fewer channels; the last one's result is the step's."""
        made = [x]
        for part in self.parts:
            kwargs = {**part.kwargs, "training": training} if "training" in part.kwargs else part.kwargs
            leaves, shape = tree_flatten((part.args, kwargs))
            leaves = [made[leaf.index] if isinstance(leaf, Slot) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(leaves, shape)
            made.append(function(part.label)(*args, **kwargs))
        return made[-1]


@dataclass(frozen=True)
class Flatten(Step):
    """(batch, channels, …) -> (batch, channels · …); new channels end up behind the old ones."""

    def run(self, x: Tensor, own: Mapping[str, Tensor], training: bool) -> Tensor:
        """Flatten all but the batch."""
        return x.flatten(1)


@dataclass(frozen=True)
class Layered(Step):
    """A step that owns tensors of the host with one entry per channel along axis 0."""

    name: str
    owned: tuple[str, ...]  # of "weight", "bias", "running_mean", "running_var", those the module has
    module: Any = field(compare=False)

    def tensors(self) -> dict[str, Tensor]:
        """Return the module's."""
        return {own: getattr(self.module, own) for own in self.owned}

    def grows(self) -> tuple[tuple[str, str], ...]:
        """List every tensor the module has one entry per channel of."""
        return tuple((own, f"{self.name}.{own}") for own in self.owned)

    def unit_parameters(self) -> int:
        """Count what one channel of each parameter holds."""
        return sum(
            parameter[0].numel() for parameter in self.module._parameters.values() if parameter is not None
        )

    def attributes(self, units: int) -> tuple[tuple[str, str, int], ...]:
        """Raise the counts the module keeps of its channels."""
        counts = ("num_features", "num_channels", "in_channels", "out_channels", "groups")
        kept = [count for count in counts if hasattr(self.module, count)]
        return tuple((self.name, count, getattr(self.module, count) + units) for count in kept)


def begun(host: Mapping[str, Tensor], units: int) -> dict[str, Tensor]:
    """Start a norm's new channels, in the numbers the host's is in: they may be finer than its layers'."""
    ones = {"weight", "running_var"}
    return {
        own: (tensor.new_ones if own in ones else tensor.new_zeros)(units) for own, tensor in host.items()
    }


@dataclass(frozen=True)
class BatchNorm(Layered):
    """Batch statistics are per channel, so new channels have their own; the mode follows the host's layer."""

    def fresh(self, units: int) -> dict[str, Tensor]:
        """Start as torch does: scale 1, shift 0, mean 0, variance 1."""
        return begun(self.tensors(), units)

    def run(self, x: Tensor, own: Mapping[str, Tensor], training: bool) -> Tensor:
        """Normalise the new channels; in training their running statistics move as the host's do."""
        mean, var = own.get("running_mean"), own.get("running_var")
        use_batch = self.module.training or mean is None
        return F.batch_norm(
            x, mean, var, own.get("weight"), own.get("bias"), use_batch, self.module.momentum, self.module.eps
        )


@dataclass(frozen=True)
class GroupNorm(Layered):
    """Widened by whole groups, so that no old group changes its members."""

    @property
    def group(self) -> int:
        """Channels per group."""
        return int(self.module.num_channels // self.module.num_groups)

    def fresh(self, units: int) -> dict[str, Tensor]:
        """Start with scale 1 and shift 0."""
        return begun(self.tensors(), units)

    def run(self, x: Tensor, own: Mapping[str, Tensor], training: bool) -> Tensor:
        """Normalise the new groups."""
        return F.group_norm(
            x, x.shape[1] // self.group, own.get("weight"), own.get("bias"), float(self.module.eps)
        )

    def attributes(self, units: int) -> tuple[tuple[str, str, int], ...]:
        """Raise channels and groups together."""
        groups = int(self.module.num_groups) + units // self.group
        channels = int(self.module.num_channels) + units
        return (self.name, "num_channels", channels), (self.name, "num_groups", groups)


@dataclass(frozen=True)
class Depthwise(Layered):
    """A convolution that keeps every channel to itself."""

    def fresh(self, units: int) -> dict[str, Tensor]:
        """Draw filters like the host's: uniform with bound 1/√fan_in (torch's default)."""
        host = self.module.weight.detach()
        bound = 1 / math.sqrt(host[0].numel())
        made = {"weight": host.new_empty(units, *host.shape[1:]).uniform_(-bound, bound)}
        if self.module.bias is not None:
            made["bias"] = self.module.bias.new_zeros(units).detach()
        return made

    def run(self, x: Tensor, own: Mapping[str, Tensor], training: bool) -> Tensor:
        """Convolve the new channels, one group each."""
        conv = self.module
        padding = conv.padding if conv.padding_mode == "zeros" else 0
        func = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(conv.kernel_size)]
        return func(x, own["weight"], own.get("bias"), conv.stride, padding, conv.dilation, x.shape[1])

    def unit_flops(self, shape: torch.Size) -> int:
        """2 · taps · positions; shape is that of the output, (batch, channels, …)."""
        return 2 * self.module.weight[0].numel() * math.prod(shape[2:])
