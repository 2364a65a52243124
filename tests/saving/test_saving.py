"""Saved folders: loaded with and without Esper, and refused when something is wrong with them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from esper.contracts import WidenEdit, WidenPlan
from esper.errors import SavedModelError, StateError
from esper.saving import rebuild_template
from esper.saving.save import FILES, load_into, save
from esper.surgery.widen_layers import widen

CARD = {"accuracy": 0.97512345, "steps": 1200}


@pytest.fixture
def plans(plan_of: Callable[[int, int], WidenPlan]) -> list[WidenPlan]:
    return [plan_of(3, 5), plan_of(5, 6), plan_of(6, 10)]


@pytest.fixture
def grown(host: nn.Module, plans: list[WidenPlan], slices_of: Callable) -> nn.Module:
    for plan in plans:
        widen(host, plan, slices_of(host, plan))
        host(torch.randn(8, 4))  # moves the BatchNorm statistics
    return host


@pytest.fixture
def folder(grown: nn.Module, plans: list[WidenPlan], tmp_path: Path) -> Path:
    return save(grown, plans, tmp_path / "grown", card=CARD)


def untouched(model: nn.Module) -> Callable[[], bool]:
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}

    def check() -> bool:
        after = model.state_dict(keep_vars=True)
        same = all(after[n] is tensor and torch.equal(tensor, copy) for n, (tensor, copy) in before.items())
        return same and after.keys() == before.keys()

    return check


def sign(folder: Path) -> None:
    """Record new digests, as whoever tampers with a folder could, and as esper 0.1.0 did: of two files."""
    lines = [
        f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n"
        for n in ("genome.json", "model.safetensors")
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))


def test_a_plain_model_becomes_the_saved_one_and_trains_on(
    folder: Path, grown: nn.Module, new_host: Callable
) -> None:
    plain = new_host()
    held = list(plain.parameters())
    optimizer = torch.optim.Adam(held)
    assert load_into(plain, folder) is plain
    assert list(plain.state_dict()) == list(grown.state_dict())
    assert all(torch.equal(t, grown.state_dict()[n]) for n, t in plain.state_dict().items())
    assert all(mine is theirs for mine, theirs in zip(held, plain.parameters(), strict=True))
    assert plain.head.weight is plain.embed.weight
    assert (plain.fc1.out_features, plain.norm.num_features, plain.fc2.in_features) == (10, 10, 10)
    x = torch.randn(8, 4)
    assert torch.equal(plain.eval()(x), grown.eval()(x))
    plain.train()(x).sum().backward()
    optimizer.step()


def test_the_card_says_what_grew_and_the_numbers(folder: Path) -> None:
    card = (folder / "card.md").read_text()
    assert {entry.name for entry in folder.iterdir()} == FILES
    assert "| parameters | 150 |" in card
    assert "| accuracy | 0.975123 |" in card
    assert "| fc1>fc2 | +2 | fc1.weight 3 → 5, fc1.bias 3 → 5," in card
    assert "| fc1>fc2 | +4 | fc1.weight 6 → 10," in card


REBUILD = """
import sys
for name in ("esper", "safetensors", "numpy"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
sys.path.insert(0, sys.argv[1])
from rebuild import load

class Host(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.fc2 = torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 5)
        self.embed, self.head = torch.nn.Linear(5, 5, bias=False), torch.nn.Linear(5, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.fc2(torch.tanh(self.norm(self.fc1(x))))
        return self.head(torch.tanh(self.embed(x)))

model = Host()
before = {n: t.clone() for n, t in model.state_dict().items()}
try:
    load(model)
except (ValueError, OSError) as error:
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()), "touched"
    sys.exit(f"refused: {error}")
print(model.eval()(torch.arange(12.0).reshape(3, 4)).double().flatten().tolist())
print(model.fc1.out_features, model.norm.num_features, model.fc2.in_features)
print(model.head.weight is model.embed.weight)
"""


def rebuild(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", REBUILD, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_rebuild_needs_torch_alone(folder: Path, grown: nn.Module) -> None:
    done = rebuild(folder)
    assert done.returncode == 0, done.stderr
    outputs, *shapes = done.stdout.splitlines()
    expected = grown.eval()(torch.arange(12.0).reshape(3, 4)).double().flatten().tolist()
    assert json.loads(outputs) == expected
    assert shapes == ["10 10 10", "True"]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit in the weights": (
        lambda f: flip(f / "model.safetensors", -5),
        "model.safetensors.* damaged",
    ),
    "a flipped bit in the header": (
        lambda f: flip(f / "model.safetensors", 30),
        "model.safetensors.* damaged",
    ),
    "a flipped bit in the genome": (lambda f: flip(f / "genome.json", 40), "genome.json.* damaged"),
    "a truncated file": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "model.safetensors.* damaged",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "no genome": (lambda f: (f / "genome.json").unlink(), "genome.json"),
    "no digests": (lambda f: (f / "SHA256SUMS").unlink(), "SHA256SUMS"),
    "empty digests": (lambda f: (f / "SHA256SUMS").write_text(""), "genome.json.* damaged"),
    "digests of two files only": (
        lambda f: (f / "SHA256SUMS").write_text("\n".join((f / "SHA256SUMS").read_text().split("\n")[:2])),
        "model.safetensors.* damaged",
    ),
    "digests without their last line's end": (
        lambda f: (f / "SHA256SUMS").write_bytes((f / "SHA256SUMS").read_bytes()[:-1]),
        "SHA256SUMS is damaged",
    ),
    "one digest more": (
        lambda f: (f / "SHA256SUMS").write_bytes((f / "SHA256SUMS").read_bytes() + b"0" * 64 + b"  x"),
        "SHA256SUMS is damaged",
    ),
    "another card": (lambda f: (f / "card.md").write_text("mine"), r"card.md is damaged.*sha256sum card.md"),
    "a flipped bit in the program": (lambda f: flip(f / "rebuild.py", 99), "rebuild.py is damaged"),
    "no program": (lambda f: (f / "rebuild.py").unlink(), "no rebuild.py"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_and_the_model_untouched(
    folder: Path, new_host: Callable, damage: str
) -> None:
    harm, message = DAMAGE[damage]
    harm(folder)
    plain = new_host()
    check = untouched(plain)
    with pytest.raises(SavedModelError, match=message):
        load_into(plain, folder)
    assert check()


def test_the_folder_can_be_checked_without_esper_or_torch(folder: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0
    flip(folder / "rebuild.py", 99)
    assert subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 1


def test_folders_of_the_first_release_load(folder: Path, grown: nn.Module, new_host: Callable) -> None:
    sign(folder)
    for fresh in (load_into(new_host(), folder), rebuild_template.load(new_host(), folder)):
        assert all(torch.equal(t, grown.state_dict()[n]) for n, t in fresh.state_dict().items())


@pytest.mark.parametrize("damage", DAMAGE)
def test_rebuild_refuses_damage_too(folder: Path, new_host: Callable, damage: str) -> None:
    DAMAGE[damage][0](folder)
    plain = new_host()
    check = untouched(plain)
    with pytest.raises((ValueError, FileNotFoundError)):
        rebuild_template.load(plain, folder)
    assert check()


def test_an_unknown_format_is_refused(folder: Path, new_host: Callable) -> None:
    recipe = json.loads((folder / "genome.json").read_text())
    (folder / "genome.json").write_text(json.dumps(recipe | {"format": 5}))
    sign(folder)
    with pytest.raises(SavedModelError, match="format 5, this Esper reads 4: update"):
        load_into(new_host(), folder)
    assert "refused: " in (stderr := rebuild(folder).stderr)
    assert "or is newer" in stderr
    (folder / "genome.json").write_text('{"format": 2, "base": {}}')
    sign(folder)
    with pytest.raises(SavedModelError, match="not of format 2: KeyError"):
        load_into(new_host(), folder)


def test_tensors_in_another_format_are_refused(folder: Path, new_host: Callable) -> None:
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04 a pickle, say")
    sign(folder)
    with pytest.raises(SavedModelError, match="not in the safetensors format"):
        load_into(new_host(), folder)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda new: new(4), r"this Host is not: its 'fc1.weight' is \[4, 4\], and \[3, 4\] is needed"),
        (lambda new: new(10), r"its 'fc1.weight' is \[10, 4\], and \[3, 4\]"),
        (lambda new: nn.Linear(4, 3), "this Linear is not: it has no 'fc1.weight'"),
        (lambda new: _with_more(new()), "its 'more.bias' is not in the folder"),
    ],
    ids=["wider", "already grown", "another class", "one layer more"],
)
def test_another_model_is_refused_naming_the_first_tensor(
    folder: Path, new_host: Callable, build: Callable, message: str
) -> None:
    model = build(new_host)
    check = untouched(model)
    with pytest.raises(SavedModelError, match=message):
        load_into(model, folder)
    assert check()


def _with_more(model: nn.Module) -> nn.Module:
    model.more = nn.Linear(1, 1)
    return model


def test_a_folder_that_contradicts_itself_is_refused(folder: Path, new_host: Callable) -> None:
    recipe = json.loads((folder / "genome.json").read_text())
    last = recipe["plans"].pop()
    (folder / "genome.json").write_text(json.dumps(recipe))
    sign(folder)
    plain = new_host()
    check = untouched(plain)
    with pytest.raises(
        SavedModelError, match=r"contradicts itself: its 'fc1.weight' is \[10, 4\], and \[6, 4\]"
    ):
        load_into(plain, folder)
    recipe["plans"].append(last | {"attributes": [["fc9", "out_features", 10]]})
    (folder / "genome.json").write_text(json.dumps(recipe))
    sign(folder)
    with pytest.raises(SavedModelError, match=r"does not fit this Host: cannot set 'out_features' of 'fc9'"):
        load_into(plain, folder)
    assert check()
    assert plain.fc1.out_features == 3


def test_saving_again_replaces_an_earlier_save_but_nothing_else(
    folder: Path, grown: nn.Module, plans: list[WidenPlan], new_host: Callable
) -> None:
    with torch.no_grad():
        grown.fc2.bias.fill_(7)
    save(grown, plans, folder, card={})
    assert load_into(new_host(), folder).fc2.bias.eq(7).all()
    assert [entry.name for entry in folder.parent.iterdir()] == ["grown"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(StateError, match="not just an earlier save; choose another folder"):
        save(grown, plans, folder, card={})
    assert (folder / "notes.txt").exists()


def test_a_full_disk_leaves_the_earlier_save(
    folder: Path,
    grown: nn.Module,
    plans: list[WidenPlan],
    new_host: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    bias = grown.fc2.bias.clone()
    with torch.no_grad():
        grown.fc2.bias.fill_(7)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateError, match=r"cannot save to .*No space left"):
        save(grown, plans, folder, card={})
    assert [entry.name for entry in folder.parent.iterdir()] == ["grown"]
    assert torch.equal(load_into(new_host(), folder).fc2.bias, bias)


def test_what_cannot_be_saved_is_refused_and_leaves_nothing(
    grown: nn.Module, plans: list[WidenPlan], tmp_path: Path
) -> None:
    with pytest.raises(StateError, match="the plans do not belong to this model"):
        save(grown, plans[:-1], tmp_path / "a", card={})
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot save to"):
        save(grown, plans, tmp_path / "file" / "b", card={})
    grown.register_buffer("odd", torch.zeros(1, dtype=torch.complex128))
    with pytest.raises(StateError, match=r"cannot save 'odd', a torch.complex128"):
        save(grown, plans, tmp_path / "c", card={})
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_layers_under_two_names_half_precision_and_channels_last(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 1, 3, dtype=torch.bfloat16))
        model.alias = model[0]
        model.register_buffer("nothing", torch.empty(0, 3))
        return model.to(memory_format=torch.channels_last)

    model = build()
    edits = (
        WidenEdit("0.weight", 0, 3, 4, ""),
        WidenEdit("0.bias", 0, 3, 4, ""),
        WidenEdit("2.weight", 1, 3, 4, ""),
    )
    plan = WidenPlan("0>2", 1, edits, (("0", "out_channels", 4), ("2", "in_channels", 4)))
    slices: dict[str, Tensor] = {
        "0.weight": torch.randn(1, 2, 3, 3),
        "0.bias": torch.randn(1),
        "2.weight": torch.randn(1, 1, 3, 3),
    }
    widen(model, plan, slices)
    folder = save(model, [plan], tmp_path / "grown", card={})
    for fresh in (load_into(build(), folder), rebuild_template.load(build(), folder)):
        assert all(torch.equal(t, model.state_dict()[n]) for n, t in fresh.state_dict().items())
        assert fresh.alias.weight is fresh[0].weight
        assert fresh[2].weight.dtype == torch.bfloat16
