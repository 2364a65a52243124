"""Does the user differentiate by an input? Then it is a leaf that needs a gradient and is no parameter."""

from __future__ import annotations

from torch import Tensor, nn


def differentiated_by(x: Tensor) -> bool:
    """Tell whether what flows back to a tensor flows on to a leaf that is no parameter.

    Its graph is walked, a node a call: a hundredth of what the pass that built it took.
    """
    if not x.requires_grad:
        return False
    if x.grad_fn is None:
        return not isinstance(x, nn.Parameter)
    seen, waiting = {x.grad_fn}, [x.grad_fn]
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)  # of the node that accumulates a leaf's gradient
            if leaf is None:
                waiting.append(node)
            elif not isinstance(leaf, nn.Parameter):
                return True
    return False
