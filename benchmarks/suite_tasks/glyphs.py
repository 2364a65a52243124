"""Letters of matplotlib's own fonts, distorted, and a residual CNN with BatchNorm that reads them."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.data import Split, stream
from benchmarks.suite_tasks.task import Size, SuiteTask

UPPER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ALIKE = "CIJKLMOPSUVWXYZ"  # upper and lower case look the same: one class
CHARACTERS = "0123456789" + UPPER + "".join(letter.lower() for letter in UPPER if letter not in ALIKE)
FONTS = ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "cmr", "cmss", "cmtt", "cmb1")
SIDE, CANVAS = 16, 48  # pixels of an image, and of the canvas it is drawn on
COUNTS = (6000, 1200, 2400)  # training, probe, test
STAGES = (12, 24)  # channels of the stages, on 8x8 and 4x4 pixels
NOISE = 0.06


def draw(random: np.random.Generator, fonts: list[ImageFont.FreeTypeFont]) -> tuple[np.ndarray, int]:
    """Draw one character: font, size, rotation, shear, scale, place, a line across, contrast and noise."""
    label = int(random.integers(len(CHARACTERS)))
    character = CHARACTERS[label]
    if character in ALIKE and random.random() < 0.5:
        character = character.lower()
    canvas = Image.new("L", (CANVAS, CANVAS))
    font = fonts[int(random.integers(len(fonts)))]
    ImageDraw.Draw(canvas).text((CANVAS / 2, CANVAS / 2), character, fill=255, font=font, anchor="mm")
    turn, shear, scale = random.normal(0, 0.1), random.normal(0, 0.1), random.uniform(0.9, 1.2)
    affine = np.array([[np.cos(turn), shear - np.sin(turn)], [np.sin(turn), np.cos(turn)]]) / scale
    middle = np.full(2, CANVAS / 2)
    shift = middle - affine @ (middle + random.uniform(-3, 3, 2))
    matrix = (*affine[0], shift[0], *affine[1], shift[1])
    canvas = canvas.transform(canvas.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    if random.random() < 0.25:
        ends = tuple(random.uniform(0, CANVAS, 4))
        ImageDraw.Draw(canvas).line(ends, fill=int(random.integers(80, 220)), width=2)
    image = np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 255
    image = image * random.uniform(0.5, 1) + random.uniform(0, 0.25) * (1 - image)
    return np.clip(image + random.normal(0, NOISE, image.shape), 0, 1), label


@cache
def pool() -> tuple[Tensor, Tensor]:
    """Draw all images once a process (3 s); seeds share them and cut them differently."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = [path for path in sorted(folder.glob("*.ttf")) if path.name.startswith(FONTS)]
    names = [path for path in names if "Display" not in path.name]
    fonts = [ImageFont.truetype(str(path), size) for path in names for size in (25, 29, 33)]
    random = np.random.default_rng(0)
    images, labels = zip(*(draw(random, fonts) for _ in range(sum(COUNTS))), strict=True)
    inputs = torch.as_tensor(np.stack(images), dtype=torch.float32)[:, None]
    return (inputs - 0.18) / 0.17, torch.tensor(labels)  # mean and deviation of a pixel


@cache
def glyphs(seed: int) -> Split:
    inputs, labels = pool()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(stream(seed, "split")))
    return Split(*((inputs[rows], labels[rows]) for rows in order.split(COUNTS)))


class Block(nn.Module):
    """Two 3x3 convolutions, normalised and rectified before each, added to what came in."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = (
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, inner, 3, padding=1, bias=False),
        )
        self.norm2, self.conv2 = nn.BatchNorm2d(inner), nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        nn.init.zeros_(self.conv2.weight)  # fixed networks too

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.norm1(x).relu())
        return x + self.conv2(self.norm2(y).relu())


class ResidualCnn(nn.Module):
    """Stages of pre-activation blocks; a size is the inner widths of each stage's blocks."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, STAGES[0], 3, stride=2, padding=1, bias=False)
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(channels, inner) for inner in inners))
            for channels, inners in zip(STAGES, size, strict=True)
        )
        self.between = nn.ModuleList(
            nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(before, after, 1, bias=False))
            for before, after in pairwise(STAGES)
        )
        self.norm, self.head = nn.BatchNorm2d(STAGES[-1]), nn.Linear(STAGES[-1], len(CHARACTERS))

    def forward(self, x: Tensor) -> Tensor:  # (batch, 1, 16, 16) -> (batch, 47)
        x = self.stages[0](self.stem(x))
        for between, stage in zip(self.between, self.stages[1:], strict=True):
            x = stage(between(x))
        return self.head(self.norm(x).relu().mean((2, 3)))


def inner_widths(net: nn.Module) -> Size:
    stages = net.get_submodule("stages").children()
    return tuple(tuple(b.conv2.in_channels for b in s.children() if isinstance(b, Block)) for s in stages)


def blocks(count: int) -> Size:
    """``count`` blocks a stage, each as wide inside as its stage."""
    return tuple((channels,) * count for channels in STAGES)


TASKS = (
    SuiteTask(
        name="glyphs",
        selection=False,
        split=glyphs,
        network=ResidualCnn,
        read=inner_widths,
        sizes=(blocks(1), blocks(2), blocks(4)),
        loss=F.cross_entropy,
        metric="accuracy",
        optimizer=torch.optim.AdamW,
        rates=(5e-3, 1e-2, 2e-2),
        steps=5 * 94,
        batch=64,
        seeds=5,
    ),
)
