"""Mutants that change nothing anybody can tell, each with its reason: they are not counted."""

from __future__ import annotations

Key = tuple[str, str, str]  # function, line, change: as `Mutation.key`

_LENGTHS = "both have the same length by the lines above; strict only says so"
_NONE = "a probe that says it has none gives none: there is nothing to bound"
_AGAIN = "the layer's own optimizer is tried once more behind itself, and refused for the same reason"
_ROUNDED = "half of one candidate, rounded up, is that one"
_SLOWER = "the long way finds the same number: the quick one only saves 40 µs"
_QUICK = (
    "if isinstance(first, Tensor) and first.dim() > 0 and not "
    "(isinstance(batch, list) and len(batch) > PARTS):"
)
EQUIVALENT: dict[str, dict[Key, str]] = {
    "src/esper/kasmina/race/racing.py": {
        (
            "Racing.learn",
            "if age in schedule.halvings and size > 1:",
            "size > 1 → (size >= 1)",
        ): _ROUNDED,
        ("Racing.learn", "if age in schedule.halvings and size > 1:", "1 → 0"): _ROUNDED,
    },
    "src/esper/kasmina/race/gate.py": {
        (
            "Gate.look",
            "elif value < self.threshold and len(differences) < self.fewest:",
            "value < self.threshold → (value <= self.threshold)",
        ): "at the threshold 1/p is no smaller, and so there are the fewest at which p can be so small",
        (
            "bounded",
            "ends = len(given) >= 0  # pyrefly: ignore  # asked, not assumed",
            "len(given) >= 0 → (len(given) > 0)",
        ): _NONE,
        (
            "bounded",
            "ends = len(given) >= 0  # pyrefly: ignore  # asked, not assumed",
            "0 → 1",
        ): _NONE,
    },
    "src/esper/kasmina/race/exposing.py": {
        (
            "step_kernel",
            "if parameter.grad is not None and scale != 1.0:",
            "1.0 → 0",
        ): "a division by 1 changes nothing",
    },
    "src/esper/tezzeret/container.py": {
        (
            "_read_parts",
            "if not whole_numbers([offset, size], 2) or offset != position or size > len(parts) - position:",
            "2 → 3",
        ): "the list always has two",
        (
            "_read_signature",
            'if not whole_numbers([facts["inputs"], facts["outputs"], facts["groups"]], 3):',
            "3 → 4",
        ): "the list always has three",
        (
            "_read_signature",
            "if any(word not in known for word, known in zip(words, allowed, strict=True)):",
            "True → False",
        ): _LENGTHS,
    },
    "src/esper/nissa/run/journal.py": {
        (
            "encode",
            "return json.dumps(plain(record, where), allow_nan=False, "
            'separators=(",", ":")).encode() + b"\\n"',
            "False → True",
        ): "plain() has turned what is not finite into text",
        (
            "_non_finite",
            'return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"',
            "value > 0 → (value >= 0)",
        ): "only infinities arrive there",
        (
            "_non_finite",
            'return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"',
            "0 → 1",
        ): "only infinities arrive there",
        ("_mend", "if ended:", "ended → True"): "what is written behind the last whole line is cut off again",
    },
    "src/esper/checkpoint/format/manifest.py": {
        (
            "parts_of",
            'text = json.dumps(skeleton, separators=(",", ":"), allow_nan=False).encode()',
            "False → True",
        ): "what is packed has text for a number that is not finite",
        (
            "parts_of",
            "STATE: [zlib.compress(text, 1)],  "
            "# JSON shrinks 5 to 10 times; weights by 8 %, which does not pay",
            "1 → 2",
        ): "another level of compression is read back as the same",
        (
            "safetensors_chunks",
            "*(raw(tensors[name]) for name in names if tensors[name].nbytes),",
            "tensors[name].nbytes → True",
        ): "a chunk without bytes adds none",
    },
    "src/esper/surgery/optimizers/adoption.py": {
        (
            "let_go",
            "group[key][:] = [one for one, kept in zip(group[key], stays, strict=True) if kept]",
            "True → False",
        ): _LENGTHS,
    },
    "src/esper/kasmina/race/own_optimizers.py": {
        (
            "OwnOptimizers.like",
            "for optimizer, index in (found, *self._others(found[0])):",
            "0 → 1",
        ): _AGAIN,
        (
            "OwnOptimizers._others",
            "return ((optimizer, 0) for optimizer in self.optimizers.values() if optimizer is not found)",
            "optimizer is not found → True",
        ): _AGAIN,
        (
            "built",
            "if needs_closure(type(optimizer)) or "
            "not all(map(kind_of(optimizer).takes, kernel.parameters())):",
            "all → any",
        ): "Muon, which alone takes some and not others, refuses the others in its constructor",
    },
    "src/esper/surgery/optimizers/widening.py": {
        (
            "_commit",
            "if change.replaced is not None:",
            "change.replaced is not None → True",
        ): "no member and no key of a state is None: nothing is exchanged",
    },
    "src/esper/batches/examples.py": {
        (
            "split_batch",
            "n for n, leaf in zip(counts, leaves, strict=True) if n is not None and "
            "not isinstance(leaf, list)",
            "True → False",
        ): _LENGTHS,
        (
            "take",
            "some = [chosen(leaf, rows) if many else leaf for leaf, many in "
            "zip(leaves, batched, strict=True)]",
            "True → False",
        ): _LENGTHS,
        (
            "example_losses",
            "own = [leaf for leaf, many in zip(leaves, batched, strict=True) if many]",
            "True → False",
        ): _LENGTHS,
        (
            "example_losses.one",
            "next(rest).unsqueeze(0) if many else leaf for leaf, many in zip(leaves, batched, strict=True)",
            "True → False",
        ): _LENGTHS,
        (
            "join",
            'tuple(getattr(leaf, "shape", (0,))[1:] for leaf, many in '
            "zip(p[0], batched, strict=True) if many)",
            "True → False",
        ): _LENGTHS,
        (
            "join",
            'tuple(getattr(leaf, "shape", (0,))[1:] for leaf, many in '
            "zip(p[0], batched, strict=True) if many)",
            "0 → 1",
        ): "the first number is left out at once",
        (
            "shared",
            "return all(many or alike(a, b) for a, b, many in zip(one, other, batched, strict=True))",
            "True → False",
        ): _LENGTHS,
        ("alike", "return False", "False → None"): "asked only whether it is true",
        (
            "count_examples",
            "if isinstance(batch, MutableMapping):",
            "isinstance(batch, MutableMapping) → False",
        ): _SLOWER,
        (
            "count_examples",
            _QUICK,
            "isinstance(first, Tensor) and first.dim() > 0 and not (isinstance(batch, list) and "
            "len(batch) > PARTS) → False",
        ): _SLOWER,
        ("count_examples", _QUICK, "0 → 1"): _SLOWER,
        (
            "count_examples",
            _QUICK,
            "isinstance(batch, list) and len(batch) > PARTS → (isinstance(batch, list) or "
            "len(batch) > PARTS)",
        ): _SLOWER,
        ("count_examples", _QUICK, "len(batch) > PARTS → (len(batch) >= PARTS)"): _SLOWER,
    },
    "src/esper/surgery/widen_layers.py": {
        (
            "extend",
            "pairs = zip(old.detach().chunk(chunks, axis), "
            "new.detach().to(old).chunk(chunks, axis), strict=True)",
            "True → False",
        ): "parts that are not equal are refused before",
        (
            "_layout",
            "if last is None:",
            "last is None → False",
        ): "in no format at all a tensor keeps its strides, which is the answer given then",
        (
            "_put_back",
            "parameter.grad = None",
            "parameter.grad = None → pass",
        ): "two lines below it is given the gradient of before, whatever it had",
        (
            "_arm_hooks",
            "if source._backward_hooks is not None:",
            "source._backward_hooks is not None → True",
        ): "the target is the source or a new tensor: without hooks it is given the None that it has",
    },
    "src/esper/kasmina/evidence/significance.py": {
        (
            "smallest",
            "low, high = high, 2 * high",
            "2 → 3",
        ): "any factor above one brackets the answer, and the halving behind it finds the same",
        (
            "smallest.passes",
            "return float(likelihood(np.ones((1, n)), unseen)[0]) <= alpha",
            "1 → 2",
        ): "rows are judged one by one, and the first is read",
    },
    "src/esper/tamiyo/selector.py": {
        (
            "SeedSelector.arms",
            "best = max(scores.values(), default=0.0)",
            "0.0 → 1.0",
        ): "without scores no site is taken, whatever the best is",
    },
}
