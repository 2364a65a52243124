"""What finish() leaves is the user's: plain torch, a Sequential of the same length, a config that fits."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.saving.pretrained import follow
from tests.integration.test_grafting import Kept

BRANCHES = [("vectors", "0+residual_mlp"), ("vectors", "0:1+residual_mlp"), ("images", "0+conv3x3")]
ALONE = """
import sys, torch
sys.modules['esper'] = None
x, expected = torch.load(sys.argv[1])
net = torch.load(sys.argv[2], weights_only=False).eval()
print(float((net(x) - expected).abs().max()))
"""


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("kind", "site"), BRANCHES, ids=[site for _, site in BRANCHES])
def test_a_model_with_a_branch_is_read_where_esper_is_not(kind: str, site: str, tmp_path: Path) -> None:
    span = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 11))
    kept = Kept(kind, site, span if ":" in site else None)
    assert kept.why == ""
    assert isinstance(kept.net, nn.Sequential)
    assert isinstance(kept.plain, nn.Sequential)
    net = kept.growth.finish().eval()
    assert list(map(type, net.modules())) == list(map(type, kept.plain.modules()))
    assert len(kept.net) == len(kept.plain)
    assert set(kept.plain.state_dict()) < set(net.state_dict())
    rebuilt = rebuild(kept, tmp_path / "saved")
    for one in (net, copy.deepcopy(net), rebuilt):
        with pytest.raises(AssertionError, match=r"torch.jit.script cannot hold the forward hook"):
            torch.jit.script(one)
    torch.save((kept.x, net(kept.x).detach()), tmp_path / "expected.pt")
    torch.save(net, tmp_path / "net.pt")
    paths = str(tmp_path / "expected.pt"), str(tmp_path / "net.pt")
    done = subprocess.run([sys.executable, "-c", ALONE, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 0


def rebuild(kept: Kept, folder: Path) -> Any:
    """Load the saved model as a process without Esper does."""
    kept.growth.save(folder)
    program: dict[str, Any] = {"__file__": str(folder / "rebuild.py"), "__name__": "rebuild"}
    exec((folder / "rebuild.py").read_text(), program)
    return program["load"](copy.deepcopy(kept.plain))


class Config:
    def __init__(self, inner: int = 3) -> None:
        self.inner, self.other = inner, None


class Built(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, config.inner), nn.Tanh(), nn.Linear(config.inner, 4)) for _ in range(2)
        )

    @classmethod
    def from_pretrained(cls, config: Config) -> Built:
        return cls(config)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def grown(widths: tuple[int, int]) -> Any:
    net = Built(Config())
    for layer, width in zip(net.layers, widths, strict=True):
        assert isinstance(layer, nn.Sequential)
        layer[0], layer[2] = nn.Linear(4, width), nn.Linear(width, 4)
    return net


def test_a_config_follows_widths_that_it_can_say() -> None:
    net = grown((7, 7))
    assert follow(net, lambda: net(torch.randn(3, 4))) == []
    assert vars(net.config) == {"inner": 7, "other": None}


def test_a_config_that_cannot_say_them_stays_and_it_is_told_what_to_do() -> None:
    net = grown((7, 5))
    (why,) = follow(net, lambda: net(torch.randn(3, 4)))
    assert "'layers.0.0.weight' the shape (7, 4)" in why or "'layers.1.0.weight' the shape (5, 4)" in why
    assert "growth.save(folder)" in why
    assert vars(net.config) == {"inner": 3, "other": None}
