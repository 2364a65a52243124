"""The demands of the catalogue suite, one function each: a verdict and what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from esper.blueprints.graph import Graph
from esper.blueprints.kernel import GraphKernel, initial_weights
from esper.blueprints.program import Program
from esper.blueprints.sizes import example_shapes

Verdict = tuple[bool | None, str]

STEPS = 100
LEARNED = 0.7  # of the first loss; the worst of the catalogue is at 0.33 after a hundred steps
STEEPEST = 10.0  # norm of the first gradient at a mean squared error of 1; the catalogue's largest is 1.1
VANISHED = 1e-9  # of the largest gradient of the step; the catalogue's smallest is 2e-6, rounding 1e-15
CLOSE = 1e-10  # float64, relative to the largest value
BFLOAT16 = 0.1  # relative; the largest of the catalogue is 0.013


@dataclass(frozen=True, slots=True)
class Subject:
    """A blueprint at one place, with what the demands draw from."""

    graph: Graph
    program: Program
    seed: int
    device: torch.device

    def example(self, index: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a random input of one of the place's example sizes."""
        shape = example_shapes(self.program.signature)[index][0]
        return torch.randn(shape, dtype=torch.float32).to(self.device, dtype)

    def newborn(self, dtype: torch.dtype = torch.float32) -> GraphKernel:
        """Return a kernel as it germinates."""
        kernel = GraphKernel(self.program, torch.empty(0, device=self.device, dtype=dtype))
        return _filled(kernel, initial_weights(self.program, self.seed))

    def grown(self, dtype: torch.dtype = torch.float64, seed: int | None = None) -> GraphKernel:
        """Return a kernel after some life: every weight is moved, the outgoing ones off zero."""
        kernel = self.newborn(dtype)
        stream = torch.Generator().manual_seed(self.seed + 1 if seed is None else seed)
        with torch.no_grad():
            for parameter in kernel.parameters():
                noise = torch.randn(parameter.shape, generator=stream)
                parameter += (0.3 * noise).to(self.device, dtype)
        return kernel


def _filled(kernel: GraphKernel, weights: dict[str, Tensor]) -> GraphKernel:
    with torch.no_grad():
        for name, value in weights.items():
            kernel.get_parameter(name).copy_(value)
    return kernel


def identity(subject: Subject) -> Verdict:
    """Adding a newborn kernel's output changes no bit of the site's."""
    for index in (0, 1):
        x = subject.example(index)
        added = subject.newborn()(x)
        y = torch.randn(added.shape, device=subject.device)
        if not torch.equal(y + added, y):
            return False, f"a newborn kernel adds up to {added.abs().max():.3g}"
    return True, "exactly zero at birth"


def shape(subject: Subject) -> Verdict:
    """The output has the site's shape on every example size."""
    pairs = example_shapes(subject.program.signature)
    kernel = subject.newborn()
    for index, (_, expected) in enumerate(pairs):
        found = tuple(kernel(subject.example(index)).shape)
        if found != expected:
            return False, f"{found} where the site has {expected}"
    return True, f"right on {len(pairs)} sizes"


def gradients(subject: Subject) -> Verdict:
    """Every parameter receives a gradient within two steps, and the first is finite and bounded."""
    kernel = subject.newborn(torch.float64)  # rounding must not pass for a gradient
    optimizer = torch.optim.SGD(kernel.parameters(), 0.1)
    x = subject.example(dtype=torch.float64)
    target = torch.randn_like(kernel(x))
    waiting = {name for name, _ in kernel.named_parameters()}
    first: float | None = None
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.mse_loss(kernel(x), target).backward()
        norms = {name: _norm(parameter) for name, parameter in kernel.named_parameters()}
        least = VANISHED * max(norms.values())
        waiting -= {name for name, norm in norms.items() if norm > least}
        first = first if first is not None else sum(norm**2 for norm in norms.values()) ** 0.5
        optimizer.step()
    if waiting:
        return False, f"no gradient within two steps reaches {', '.join(sorted(waiting))}"
    if first is None or not 0 < first <= STEEPEST:
        return False, f"the first gradient has the norm {first}; it must lie in 0…{STEEPEST:g}"
    return True, f"all parameters; the first has the norm {first:.2g}"


def _norm(parameter: Tensor) -> float:
    return 0.0 if parameter.grad is None else float(parameter.grad.norm())


def dtypes(subject: Subject) -> Verdict:
    """Weights and outputs have the dtype and device of the site, forward and backward, autocast included."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        kernel, x = subject.grown(dtype), subject.example(dtype=dtype)
        found = kernel(x)
        found.square().mean().backward()
        if found.dtype != dtype or found.device.type != subject.device.type:
            return False, f"{found.dtype} on {found.device} where the site is {dtype} on {subject.device}"
        if not bool(found.isfinite().all()):
            return False, f"not finite in {dtype}"
    kernel, x = subject.grown(torch.float32), subject.example()
    exact = kernel(x)
    with torch.autocast(subject.device.type, torch.bfloat16):
        found = kernel(x)
    found.float().square().mean().backward()
    apart = _apart(found.float(), exact)
    return apart <= BFLOAT16, f"follows; autocast to bfloat16 is {apart:.2g} off"


def _apart(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach(), exact.detach()
    return float((found - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def deterministic(subject: Subject) -> Verdict:
    """The same seed gives the same weights, the same input the same output, and no random stream moves."""
    before = torch.random.get_rng_state()
    a, b = (initial_weights(subject.program, subject.seed) for _ in range(2))
    if not torch.equal(before, torch.random.get_rng_state()):
        return False, "drawing weights moves the global random stream"
    if any(not torch.equal(a[name], b[name]) for name in a):
        return False, "the same seed gives different weights"
    kernel, x = subject.grown(), subject.example(dtype=torch.float64)
    if not torch.equal(kernel(x), kernel(x)):
        return False, "the same input gives different outputs"
    return True, "same seed, same bits"


def vmap(subject: Subject) -> Verdict:
    """Candidates run together give what each gives alone: races are batched."""
    kernels = [subject.grown(seed=number) for number in range(3)]
    x = subject.example(dtype=torch.float64)
    stacked = [  # one tensor (kernels, …) per weight
        torch.stack([kernel.get_parameter(weight.name) for kernel in kernels])
        for weight in subject.program.weights
    ]
    together = torch.func.vmap(partial(subject.program.run, x))(stacked)  # (kernels, batch, …)
    apart = _apart(together, torch.stack([kernel(x) for kernel in kernels]))
    return apart <= CLOSE, f"{apart:.2g} off the loop"


def export(subject: Subject) -> Verdict:
    """``torch.export`` takes the kernel with an open number of examples."""
    kernel, x = subject.grown(), subject.example(dtype=torch.float64)
    try:
        exported = torch.export.export(kernel, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    except AttributeError as error:  # a build of torch without export
        return None, f"this torch cannot export: {error}"
    more = torch.cat([x, x.flip(0)])  # (2 · batch, …)
    apart = _apart(exported.module()(more), kernel(more))
    return apart <= CLOSE, f"{apart:.2g} off at another batch size"


def learns(subject: Subject) -> Verdict:
    """A hundred steps towards a kernel of the same kind with other weights lower the loss."""
    teacher, student = subject.grown(torch.float32), subject.newborn()
    shape = example_shapes(subject.program.signature)[0][0]
    x = torch.randn((16, *shape[1:]), device=subject.device)
    with torch.no_grad():
        target = teacher(x)
        target = target / target.std().clamp_min(1e-12)
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    losses: list[float] = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(student(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] <= LEARNED * losses[0], f"loss {losses[0]:.3g} → {losses[-1]:.3g} in {STEPS} steps"


def honest(subject: Subject) -> Verdict:
    """What the graph says of itself is true: affine is affine, and no position sees what it must not."""
    kernel = subject.grown()
    a, b = (subject.example(dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        bend = _apart(kernel(a + b) + kernel(torch.zeros_like(a)), kernel(a) + kernel(b))
        if subject.graph.affine and bend > CLOSE:
            return False, f"it says it is affine and bends by {bend:.2g}"
        if subject.program.signature.layout == "sequence" and subject.graph.mixes != "all":
            changed = a.clone()
            changed[:, -1] = b[:, -1]
            leak = _apart(kernel(changed)[:, :-1], kernel(a)[:, :-1])
            if leak > CLOSE:
                return False, f"it mixes {subject.graph.mixes}, yet the last step reaches earlier ones"
    return True, f"{'affine' if subject.graph.affine else 'not affine'}, mixes {subject.graph.mixes}"


DEMANDS: dict[str, Callable[[Subject], Verdict]] = {
    "identity": identity,
    "shape": shape,
    "gradients": gradients,
    "dtypes": dtypes,
    "deterministic": deterministic,
    "vmap": vmap,
    "export": export,
    "learns": learns,
    "honest": honest,
}
