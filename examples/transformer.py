"""One block of a transformer, as both examples have it: pre-norm attention, then an MLP to be widened."""

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, head: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.head, self.causal = head, causal
        self.q, self.k, self.v = (nn.Linear(dim, heads * head, bias=False) for _ in range(3))
        self.out = nn.Linear(heads * head, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # (batch, heads, places, head)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, head: int, heads: int, hidden: int, causal: bool) -> None:
        super().__init__()
        self.before_attention, self.attention = nn.LayerNorm(dim), Attention(dim, head, heads, causal)
        self.before_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x))
        return x + self.mlp(self.before_mlp(x))
