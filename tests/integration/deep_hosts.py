"""Hosts with stacks of residual blocks; without Esper, so that a saved one is rebuilt where it is not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attentive(nn.Module):
    """A pre-norm block as in GPT or ViT."""

    def __init__(self, width: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time, 3, 2, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.dropout(self.out(y.transpose(1, 2).reshape(x.shape)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    def __init__(self, blocks: int = 2, width: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, width), nn.Linear(width, 11)
        self.blocks = nn.ModuleList(Attentive(width, True, dropout) for _ in range(blocks))
        self.apply(small)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def small(module: nn.Module) -> None:
    """Start as GPT-2 does."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(2, 8, 3, 3), nn.Linear(8, 11)
        self.blocks = nn.Sequential(Attentive(8, False, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class Basic(nn.Module):
    """The block of ResNet-18."""

    def __init__(self, given: int, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(given, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.short = nn.Identity() if given == width else nn.Conv2d(given, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.short(x) + y)


def resnet() -> nn.Module:
    stage = nn.Sequential(Basic(4, 6), Basic(6, 6))
    return nn.Sequential(nn.Conv2d(2, 4, 3), stage, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 11))


class Residual(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 12), nn.ReLU(), nn.Linear(12, width), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), Residual(), Residual(), nn.LayerNorm(8), nn.Linear(8, 11))


class Encoder(nn.Module):
    def __init__(self, norm_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)))


HOSTS = {"gpt": GPT, "vit": ViT, "resnet": resnet, "mlp": mlp, "encoder": Encoder}
SITES = {
    "gpt": "blocks+block", "vit": "blocks+block", "resnet": "1.1+block", "mlp": "1+block",
    "encoder": "encoder.layers+block",
}  # fmt: skip
NEW = {"gpt": "blocks.2", "vit": "blocks.1", "resnet": "1.2", "mlp": "2_1", "encoder": "encoder.layers.2"}
INPUTS = {
    "gpt": lambda n: torch.randint(0, 11, (n, 5)),
    "vit": lambda n: torch.randn(n, 2, 6, 6),
    "resnet": lambda n: torch.randn(n, 2, 8, 8),
    "mlp": lambda n: torch.randn(n, 8),
    "encoder": lambda n: torch.randint(0, 11, (n, 5)),
}
