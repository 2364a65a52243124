"""Small hosts of many kinds, each written the way its kind usually is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CLASSES = 5


class Net(nn.Module):
    """Layers by name and a forward pass given as a function."""

    def __init__(self, body: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.body = body

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


def linear(n: int, m: int, bias: bool = True) -> nn.Linear:
    return nn.Linear(n, m, bias=bias)


def conv(n: int, m: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(n, m, size, padding=size // 2, **options)


def pooled(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


# -- multilayer perceptrons --


def mlp() -> nn.Module:
    return nn.Sequential(linear(6, 7), nn.ReLU(), linear(7, 8), nn.GELU(), linear(8, CLASSES))


def mlp_norm() -> nn.Module:
    def body(s: Any, x: Tensor) -> Tensor:
        return s.head(s.norm(s.fc2(F.silu(s.fc1(x)))))

    return Net(body, fc1=linear(6, 9), fc2=linear(9, 8), norm=nn.LayerNorm(8), head=linear(8, CLASSES))


def mlp_residual() -> nn.Module:
    def body(s: Any, x: Tensor) -> Tensor:
        x = s.stem(x)
        for up, down in zip(s.ups, s.downs, strict=True):
            x = x + down(torch.relu(up(x)))
        return s.head(x)

    ups, downs = (nn.ModuleList(linear(*size) for _ in range(2)) for size in ((8, 5), (5, 8)))
    return Net(body, stem=linear(6, 8), ups=ups, downs=downs, head=linear(8, CLASSES))


def mlp_tied() -> nn.Module:
    """An autoencoder whose outer layers share a weight, with free layers inside."""

    def body(s: Any, x: Tensor) -> Tensor:
        h = s.fc2(torch.tanh(s.fc1(F.linear(x, s.embed.weight))))
        return s.head(F.linear(h, s.embed.weight.t()))

    return Net(
        body, embed=linear(6, 8, bias=False), fc1=linear(8, 5), fc2=linear(5, 8), head=linear(6, CLASSES)
    )


def handwritten() -> nn.Module:
    """Activations as formulas, as Hugging Face writes GELU."""

    def body(s: Any, x: Tensor) -> Tensor:
        x = s.fc1(x)
        x = 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
        x = s.fc2(x)
        return s.head(x * torch.sigmoid(x))

    return Net(body, fc1=linear(6, 7), fc2=linear(7, 8), head=linear(8, CLASSES))


def autoencoder() -> nn.Module:
    sizes = [(6, 8), (8, 3), (3, 8)]
    layers = [part for n, m in sizes for part in (linear(n, m), nn.ReLU())]
    return nn.Sequential(*layers, linear(8, 6), linear(6, CLASSES))


def siamese() -> nn.Module:
    def body(s: Any, x: Tensor) -> Tensor:
        one, two = s.tower(x), s.tower(x.flip(-1))
        return s.head(torch.relu(s.join((one - two).abs())))

    tower = nn.Sequential(linear(6, 7), nn.ReLU(), linear(7, 8))
    return Net(body, tower=tower, join=linear(8, 6), head=linear(6, CLASSES))


def mixture() -> nn.Module:
    def body(s: Any, x: Tensor) -> Tensor:
        weights = s.gate(x).softmax(-1)  # (batch, experts)
        return sum(
            (weights[:, i : i + 1] * expert(x) for i, expert in enumerate(s.experts)),
            torch.zeros(()),
        )

    def expert() -> nn.Module:
        return nn.Sequential(linear(6, 7), nn.GELU(), linear(7, CLASSES))

    return Net(body, gate=linear(6, 3), experts=nn.ModuleList(expert() for _ in range(3)))


def branching() -> nn.Module:
    """A data-dependent ``if``."""

    def body(s: Any, x: Tensor) -> Tensor:
        x = torch.relu(s.fc1(x * 2 if float(x.detach().abs().max()) > 100 else x))
        return s.fc3(torch.relu(s.fc2(x)))

    return Net(body, fc1=linear(6, 7), fc2=linear(7, 7), fc3=linear(7, CLASSES))


# -- convolutions --


def cnn() -> nn.Module:
    return nn.Sequential(
        conv(2, 4), nn.ReLU(), nn.MaxPool2d(2), conv(4, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        linear(5, CLASSES),
    )  # fmt: skip


def vgg() -> nn.Module:
    features = [conv(2, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), conv(4, 5), nn.ReLU()]
    return nn.Sequential(
        *features, nn.Flatten(), linear(5 * 16, 9), nn.ReLU(), nn.Dropout(0.1), linear(9, CLASSES)
    )


class Block(nn.Module):
    def __init__(self, size: int, before: bool, groups: int = 1) -> None:
        super().__init__()
        self.before = before
        self.norm1, self.norm2 = nn.BatchNorm2d(size if before else 6), nn.BatchNorm2d(6 if before else size)
        self.conv1 = conv(size, 6, bias=False)
        self.mid = conv(6, 6, groups=groups, bias=False) if groups > 1 else nn.Identity()
        self.conv2 = conv(6, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            return x + self.conv2(torch.relu(self.norm2(self.mid(self.conv1(torch.relu(self.norm1(x)))))))
        return torch.relu(x + self.norm2(self.conv2(self.mid(torch.relu(self.norm1(self.conv1(x)))))))


def blocks(**options: Any) -> nn.Module:
    def body(s: Any, x: Tensor) -> Tensor:
        return s.head(pooled(s.last(s.blocks(s.stem(x)))))

    inner = nn.Sequential(*(Block(4, **options) for _ in range(2)))
    return Net(body, stem=conv(2, 4), blocks=inner, last=conv(4, 5), head=linear(5, CLASSES))


def resnet() -> nn.Module:
    return blocks(before=False)


def preactivation() -> nn.Module:
    return blocks(before=True)


def resnext() -> nn.Module:
    return blocks(before=False, groups=2)


def densenet() -> nn.Module:
    def body(s: Any, x: Tensor) -> Tensor:
        x = s.stem(x)
        for squeeze, grow in zip(s.squeezes, s.grows, strict=True):
            x = torch.cat([x, grow(torch.relu(squeeze(torch.relu(x))))], 1)
        return s.head(pooled(x))

    squeezes = nn.ModuleList(conv(4 + 3 * i, 5, 1) for i in range(2))
    grows = nn.ModuleList(conv(5, 3) for _ in range(2))
    return Net(body, stem=conv(2, 4), squeezes=squeezes, grows=grows, head=linear(10, CLASSES))


def unet() -> nn.Module:
    def double(n: int, m: int) -> nn.Module:
        return nn.Sequential(conv(n, m), nn.BatchNorm2d(m), nn.ReLU(), conv(m, m), nn.ReLU())

    def body(s: Any, x: Tensor) -> Tensor:
        down = s.down(x)
        inner = s.inner(F.max_pool2d(down, 2))
        up = torch.cat([F.interpolate(inner, scale_factor=2.0, mode="nearest"), down], 1)
        return s.head(s.up(up))  # (batch, classes, height, width)

    return Net(body, down=double(2, 4), inner=double(4, 6), up=double(10, 4), head=conv(4, CLASSES, 1))


def mobilenet() -> nn.Module:
    def inverted() -> nn.Module:
        wide = [conv(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(), conv(8, 8, groups=8), nn.BatchNorm2d(8)]
        return nn.Sequential(*wide, nn.ReLU6(), conv(8, 4, 1), nn.BatchNorm2d(4))

    def body(s: Any, x: Tensor) -> Tensor:
        x = F.relu6(s.stem(x))
        for block in s.blocks:
            x = x + block(x)
        return s.head(pooled(x))

    return Net(body, stem=conv(2, 4), blocks=nn.ModuleList([inverted(), inverted()]), head=linear(4, CLASSES))


def squeeze_excite() -> nn.Module:
    def body(s: Any, x: Tensor) -> Tensor:
        x = torch.relu(s.conv1(x))
        scale = torch.sigmoid(s.excite(torch.relu(s.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return s.head(pooled(s.conv2(x * scale)))

    layers = {"conv1": conv(2, 6), "squeeze": conv(6, 3, 1), "excite": conv(3, 6, 1), "conv2": conv(6, 4)}
    return Net(body, **layers, head=linear(4, CLASSES))


def groupnorm() -> nn.Module:
    return nn.Sequential(
        conv(2, 4), nn.GroupNorm(2, 4), nn.SiLU(), conv(4, 6), nn.GroupNorm(3, 6), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(6, CLASSES),
    )  # fmt: skip


def inception() -> nn.Module:
    def body(s: Any, x: Tensor) -> Tensor:
        x = torch.cat([s.one(x), s.three(torch.relu(s.reduce3(x))), s.five(torch.relu(s.reduce5(x)))], 1)
        return s.head(pooled(torch.relu(x)))

    layers = {"reduce3": conv(2, 3, 1), "three": conv(3, 4), "reduce5": conv(2, 3, 1), "five": conv(3, 4, 5)}
    return Net(body, one=conv(2, 4, 1), **layers, head=linear(12, CLASSES))


def tcn() -> nn.Module:
    def body(s: Any, x: Tensor) -> Tensor:
        x = s.stem(x)
        for i, (one, two) in enumerate(zip(s.ones, s.twos, strict=True)):
            h = torch.relu(one(F.pad(x, (2 * 2**i, 0))))
            x = x + two(F.pad(h, (2 * 2**i, 0)))
        return s.head(x.mean(-1))

    def dilated(n: int, m: int) -> nn.ModuleList:
        return nn.ModuleList(nn.Conv1d(n, m, 3, dilation=2**i) for i in range(2))

    return Net(body, stem=nn.Conv1d(3, 4, 1), ones=dilated(4, 5), twos=dilated(5, 4), head=linear(4, CLASSES))


def volumes() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 3, 3, padding=1), nn.BatchNorm3d(3), nn.ReLU(), nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), linear(4, CLASSES),
    )  # fmt: skip


# -- sequences --


class Attention(nn.Module):
    """Heads in three layers; ``context`` makes it cross-attention."""

    def __init__(self, width: int, heads: int, causal: bool, fast: bool) -> None:
        super().__init__()
        self.heads, self.causal, self.fast = heads, causal, fast
        self.q, self.k, self.v, self.out = (linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            layer(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, source in ((self.q, x), (self.k, context), (self.v, context))
        )
        if self.fast:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            if self.causal:
                ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
                scores = scores.masked_fill(ahead, float("-inf"))
            y = scores.softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(
        self, width: int, causal: bool, fast: bool, cross: bool = False, swiglu: bool = False
    ) -> None:
        super().__init__()
        self.attention = Attention(width, 2, causal, fast)
        self.cross = Attention(width, 2, False, fast) if cross else None
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if cross else 2))
        self.up, self.down = linear(width, 10), linear(10, width)
        self.gate = linear(width, 10) if swiglu else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        if self.cross is not None:
            x = x + self.cross(self.norms[2](x), context)
        h = self.norms[1](x)
        h = F.gelu(self.up(h)) if self.gate is None else F.silu(self.gate(h)) * self.up(h)
        return x + self.down(h)


def vit() -> nn.Module:
    def body(s: Any, x: Tensor) -> Tensor:
        x = s.patches(x).flatten(2).transpose(1, 2) + s.positions.weight
        for layer in s.layers:
            x = layer(x)
        return s.head(s.norm(x).mean(1))

    layers = nn.ModuleList(Layer(8, causal=False, fast=True) for _ in range(2))
    return Net(
        body, patches=nn.Conv2d(2, 8, 4, stride=4), positions=nn.Embedding(4, 8), layers=layers,
        norm=nn.LayerNorm(8), head=linear(8, CLASSES),
    )  # fmt: skip


def gpt(**options: Any) -> nn.Module:
    """Causal, with the embedding's weight as the head's."""

    def body(s: Any, ids: Tensor) -> Tensor:
        x = s.embed(ids)
        for layer in s.layers:
            x = checkpoint(layer, x, use_reentrant=False) if options.get("checkpointed") else layer(x)
        return s.head(s.norm(x))  # (batch, time, tokens)

    kinds = {"causal": True, "fast": options.get("fast", False), "swiglu": options.get("swiglu", False)}
    layers = nn.ModuleList(Layer(8, **kinds) for _ in range(2))
    net = Net(
        body,
        embed=nn.Embedding(CLASSES, 8),
        layers=layers,
        norm=nn.LayerNorm(8),
        head=linear(8, CLASSES, False),
    )
    net.head.weight = net.embed.weight
    return net


def swiglu() -> nn.Module:
    return gpt(swiglu=True, fast=True)


def checkpointed() -> nn.Module:
    return gpt(checkpointed=True)


def translator() -> nn.Module:
    def body(s: Any, ids: Tensor) -> Tensor:
        memory = s.encoder(s.embed(ids))
        return s.head(s.decoder(s.embed(ids.flip(1)), memory))

    encoder, decoder = Layer(8, causal=False, fast=True), Layer(8, causal=True, fast=False, cross=True)
    return Net(
        body, embed=nn.Embedding(CLASSES, 8), encoder=encoder, decoder=decoder, head=linear(8, CLASSES)
    )


def torch_encoder() -> nn.Module:
    def body(s: Any, ids: Tensor) -> Tensor:
        return s.head(torch.relu(s.fc(s.layer(s.embed(ids)).mean(1))))

    layer = nn.TransformerEncoderLayer(8, 2, 10, dropout=0.0, batch_first=True)
    return Net(body, embed=nn.Embedding(CLASSES, 8), layer=layer, fc=linear(8, 7), head=linear(7, CLASSES))


def recurrent(kind: type[nn.LSTM] | type[nn.GRU]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        def body(s: Any, ids: Tensor) -> Tensor:
            return s.head(torch.tanh(s.fc(s.rnn(s.embed(ids))[0][:, -1])))

        rnn = kind(6, 7, batch_first=True)
        return Net(body, embed=nn.Embedding(CLASSES, 6), rnn=rnn, fc=linear(7, 6), head=linear(6, CLASSES))

    return make


class Conv1D(nn.Module):
    """Hugging Face's linear layer: its weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.3), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view((*x.size()[:-1], self.nf))


class GPT2Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = width, heads, width // heads
        self.split_size = width
        self.c_attn, self.c_proj = Conv1D(3 * width, width), Conv1D(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).split(self.split_size, dim=2)
        q, k, v = (t.view(*t.shape[:-1], -1, self.head_dim).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.c_proj(y.reshape(*y.shape[:-2], -1).contiguous())


def gpt2() -> nn.Module:
    """Hugging Face's GPT-2 in small, gates and all."""

    def body(s: Any, ids: Tensor) -> Tensor:
        x = s.embed(ids)
        x = x + s.attention(s.norm1(x))
        x = x + s.c_proj(F.gelu(s.c_fc(s.norm2(x)), approximate="tanh"))
        return s.head(x)

    norms = {"norm1": nn.LayerNorm(8), "norm2": nn.LayerNorm(8)}
    layers = {"attention": GPT2Attention(8, 2), "c_fc": Conv1D(10, 8), "c_proj": Conv1D(8, 10), **norms}
    return Net(body, embed=nn.Embedding(CLASSES, 8), head=linear(8, CLASSES), **layers)


def upsampling() -> nn.Module:
    """An autoencoder whose decoder is of transposed convolutions."""

    def up(n: int, m: int, **options: Any) -> nn.ConvTranspose2d:
        return nn.ConvTranspose2d(n, m, 3, stride=2, padding=1, **options)

    return nn.Sequential(
        conv(2, 5, stride=2), nn.BatchNorm2d(5), nn.ReLU(), conv(5, 6, stride=2), nn.ReLU(),
        up(6, 5, output_padding=1), nn.BatchNorm2d(5), nn.ReLU(), up(5, 3, output_padding=1, bias=False),
        nn.Tanh(), conv(3, CLASSES),
    )  # fmt: skip


def upsampling_1d() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose1d(3, 4, 2, stride=2), nn.ReLU(), nn.Conv1d(4, 5, 3), nn.GELU(),
        nn.ConvTranspose1d(5, 4, 3, dilation=2), nn.ReLU(), nn.Flatten(), linear(4 * 20, CLASSES),
    )  # fmt: skip


def upsampling_3d() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose3d(1, 3, 2, stride=2), nn.BatchNorm3d(3), nn.ReLU(), nn.ConvTranspose3d(3, 2, 1),
        nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), linear(2, CLASSES),
    )  # fmt: skip


def bag() -> nn.Module:
    def body(s: Any, ids: Tensor) -> Tensor:
        user, item = s.user(s.bag(ids)), s.item(s.bag(ids.flip(1)))
        return s.head(user * item)

    def tower() -> nn.Module:
        return nn.Sequential(linear(6, 7), nn.ReLU(), linear(7, 8))

    return Net(body, bag=nn.EmbeddingBag(CLASSES, 6), user=tower(), item=tower(), head=linear(8, CLASSES))


# -- ways of calling --


def tuples() -> nn.Module:
    def body(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(s.fc2(torch.relu(s.fc1(x))))
        return s.head(h), s.value(h)

    return Net(body, fc1=linear(6, 7), fc2=linear(7, 8), head=linear(8, CLASSES), value=linear(8, 1))


def dicts() -> nn.Module:
    def body(s: Any, x: Tensor) -> dict[str, Tensor]:
        return {"logits": s.head(torch.relu(s.fc1(x))), "input": x}

    return Net(body, fc1=linear(6, 7), head=linear(7, CLASSES))


def keywords() -> nn.Module:
    def body(s: Any, *, features: Tensor, scale: float = 1.0) -> Tensor:
        return s.head(torch.relu(s.fc1(features * scale)))

    return Net(body, fc1=linear(6, 7), head=linear(7, CLASSES))


def half() -> nn.Module:
    def body(s: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return s.head(F.gelu(s.fc2(torch.relu(s.fc1(x))))).float()

    return Net(body, fc1=linear(6, 7), fc2=linear(7, 8), head=linear(8, CLASSES))


def channels_last() -> nn.Module:
    return cnn().to(memory_format=torch.channels_last)


# -- the list --


def flat() -> Tensor:
    return torch.randn(6, 6)


def image() -> Tensor:
    return torch.randn(6, 2, 8, 8)


def ids() -> Tensor:
    return torch.randint(CLASSES, (6, 5))


@dataclass(frozen=True)
class Host:
    """How to build a host, what it is called with, and the sites it must have."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    sites: int  # places to widen
    exact: float = 1.0  # how many times the usual rounding; bf16 rounds coarsely


HOSTS: dict[str, Host] = {
    "mlp": Host(mlp, flat, 2),
    "mlp with LayerNorm": Host(mlp_norm, flat, 1),
    "residual mlp": Host(mlp_residual, flat, 2),
    "tied autoencoder": Host(mlp_tied, flat, 1),
    "activations by hand": Host(handwritten, flat, 2),
    "autoencoder": Host(autoencoder, flat, 4),
    "siamese": Host(siamese, flat, 2),
    "soft mixture": Host(mixture, flat, 3),
    "data-dependent if": Host(branching, flat, 2),
    "cnn": Host(cnn, image, 2),
    "VGG": Host(vgg, image, 3),
    "ResNet": Host(resnet, image, 3),
    "pre-activation ResNet": Host(preactivation, image, 3),
    "ResNeXt": Host(resnext, image, 1),
    "DenseNet": Host(densenet, image, 2),
    "U-Net": Host(unet, image, 4),
    "MobileNet": Host(mobilenet, image, 2),
    "squeeze and excite": Host(squeeze_excite, image, 2),
    "GroupNorm cnn": Host(groupnorm, image, 2),
    "inception": Host(inception, image, 2),
    "TCN": Host(tcn, lambda: torch.randn(6, 3, 9), 2),
    "Conv3d": Host(volumes, lambda: torch.randn(4, 1, 4, 4, 4), 2),
    "ViT": Host(vit, image, 4),
    "GPT": Host(gpt, ids, 4),
    "GPT with SwiGLU": Host(swiglu, ids, 4),
    "GPT with checkpointing": Host(checkpointed, ids, 4),
    "encoder-decoder": Host(translator, ids, 4),
    "nn.TransformerEncoderLayer": Host(torch_encoder, ids, 2),
    "LSTM": Host(recurrent(nn.LSTM), ids, 2),
    "GRU": Host(recurrent(nn.GRU), ids, 2),
    "GPT-2": Host(gpt2, ids, 2),
    "ConvTranspose2d": Host(upsampling, image, 4),
    "ConvTranspose1d": Host(upsampling_1d, lambda: torch.randn(6, 3, 9), 3),
    "ConvTranspose3d": Host(upsampling_3d, lambda: torch.randn(4, 1, 3, 3, 3), 2),
    "two towers": Host(bag, ids, 2),
    "tuple output": Host(tuples, flat, 2),
    "dict output": Host(dicts, flat, 1),
    "keyword inputs": Host(keywords, lambda: {"features": flat(), "scale": 2.0}, 1),
    "bf16 autocast": Host(half, flat, 2, exact=4e3),
    "channels_last": Host(channels_last, lambda: image().to(memory_format=torch.channels_last), 2),
}


def run(model: nn.Module, given: Any) -> Any:
    """Call a model with what its host is called with."""
    return model(**given) if isinstance(given, dict) else model(given)


def logits(output: Any) -> Tensor:
    """Return the class scores of any host, (examples, classes)."""
    output = (
        output[0] if isinstance(output, tuple) else output["logits"] if isinstance(output, dict) else output
    )
    return output.movedim(1, -1).flatten(0, -2) if output.dim() == 4 else output.flatten(0, -2)


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    scores = logits(run(model, batch[0]))
    return F.cross_entropy(scores, batch[1].repeat_interleave(len(scores) // len(batch[1])))


def batch(kind: str) -> tuple[Any, Tensor]:
    given = HOSTS[kind].inputs()
    first = next(iter(given.values())) if isinstance(given, dict) else given
    return given, torch.randint(CLASSES, (len(first),))
