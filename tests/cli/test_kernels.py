"""``esper kernels``: what is sound is shown, what is not is named, and nothing needs torch."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from esper.contracts import Kernel, Signature, kernel_id
from esper.tezzeret.container import publish, seal
from esper.tezzeret.signing import load_key
from esper.urza.folder import FolderStore

SIGNATURE = Signature("image", "parallel", 4, 6, (3, 3), (1, 1), (1, 1), (1, 1))


def weights(fill: bytes = b"\0") -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    return struct.pack("<Q", len(header)) + header + fill * 24


def kernel(seed: int, name: str = "separable") -> Kernel:
    graph = json.dumps({"name": name, "nodes": []})
    made = kernel_id(graph, SIGNATURE, 8, seed, "eager", "torch 2.13.0")
    report = {"milliseconds": 12.5}
    return Kernel(made, graph, SIGNATURE, 8, seed, "eager", "torch 2.13.0", weights(), {}, report)


@pytest.fixture
def shop(tmp_path: Path, esper):
    """Three kernels, one of them published, and the command over them."""
    key = load_key(tmp_path / "data" / "kernel.key", create=True)
    store = FolderStore(tmp_path / "store")
    made = [kernel(1), kernel(2), publish(kernel(1), weights(b"\1"))]
    for one in made:
        store.put(one.id, seal(one, key))
    environment = {
        "ESPER_KERNEL_KEY": str(tmp_path / "data" / "kernel.key"),
        "ESPER_KERNEL_STORE": str(store.folder),
    }

    def run(*arguments: object, **changes: str):
        return esper("kernels", *arguments, **environment, **changes)

    return store, made, run


def test_list_names_every_kernel(shop) -> None:
    store, made, run = shop
    ran = run("list")
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["kernel", *(one[:12] for one in store.ids())]
    assert all("separable" in line and "image 4 → 6, parallel" in line for line in lines[1:])
    assert sorted(word for line in lines for word in line.split() if word in ("initial", "published")) == [
        "initial",
        "initial",
        "published",
    ]
    rows = json.loads(run("list", "--json").stdout)
    assert {row["id"]: row["published"] for row in rows} == {
        one.id: published for one, published in zip(made, (False, False, True), strict=True)
    }


def test_an_empty_store_needs_no_key(esper, tmp_path: Path) -> None:
    store = tmp_path / "none"
    for arguments in (("list",), ("verify", "--all")):
        ran = esper("kernels", *arguments, "--store", store, HOME=str(tmp_path))
        assert ran.returncode == 0, ran.stderr
    assert json.loads(esper("kernels", "list", "--store", store, "--json").stdout) == []
    assert not store.exists()


def test_show_says_all_that_is_known(shop) -> None:
    _, (one, *_), run = shop
    facts = json.loads(run("show", one.id, "--json").stdout)
    assert facts["id"] == one.id
    assert facts["weights"] == {"w": {"dtype": "F32", "shape": [2, 3]}}
    assert facts["report"] == {"milliseconds": 12.5}
    assert facts["graph"] == {"name": "separable", "nodes": []}
    people = run("show", one.id[:12])
    assert people.returncode == 0, people.stderr
    assert one.id in people.stdout
    assert "torch 2.13.0" in people.stdout


def test_show_says_which_kernels_there_are(shop) -> None:
    store, _, run = shop
    for asked in ("zz", "../../etc/passwd", ""):
        ran = run("show", asked)
        assert ran.returncode == 2
        assert "Traceback" not in ran.stderr
        assert all(one[:12] in ran.stderr for one in store.ids())


def test_verify_finds_all_sound(shop) -> None:
    store, (one, *_), run = shop
    ran = run("verify", "--all")
    assert ran.returncode == 0, ran.stderr
    assert "3 of 3 kernels" in ran.stdout
    assert json.loads(run("verify", "--all", "--json").stdout) == {"verified": store.ids(), "refused": {}}
    assert "1 of 1 kernels" in run("verify", one.id).stdout


def test_verify_says_one_line_per_refused_container(shop, tmp_path: Path) -> None:
    store, made, run = shop
    damaged = bytearray(store.get(made[0].id))
    damaged[-1] ^= 1
    store.put(made[0].id, bytes(damaged))
    store.put(made[1].id, store.get(made[2].id))
    link = "f" * 64
    (store.folder / "ff").mkdir(exist_ok=True)
    (store.folder / "ff" / f"{link}.kernel").symlink_to(tmp_path / "data" / "kernel.key")
    ran = run("verify", "--all")
    assert ran.returncode == 1
    *refused, last = ran.stdout.splitlines()
    reasons = dict(line.split(": ", 1) for line in refused)
    assert reasons.keys() == {made[0].id, made[1].id, link}
    assert "digest" in reasons[made[0].id]
    assert "asked for was" in reasons[made[1].id]
    assert "a link" in reasons[link]
    assert last.startswith("1 of 4 kernels")
    told = json.loads(run("verify", "--all", "--json").stdout)
    assert told == {"verified": [made[2].id], "refused": reasons}
    assert run("verify", made[2].id).returncode == 0
    listed = run("list")
    assert listed.returncode == 0
    assert listed.stdout.count("refused ") == 3


def test_another_key_opens_nothing(shop, tmp_path: Path) -> None:
    store, _, run = shop
    (tmp_path / "data" / "kernel.key").write_bytes(b"o" * 32)
    ran = run("verify", "--all")
    assert ran.returncode == 1
    assert ran.stdout.count("another key") == len(store.ids())


def test_a_key_that_is_missing_or_open_to_others_is_bad_input(shop, tmp_path: Path) -> None:
    _, _, run = shop
    key = tmp_path / "data" / "kernel.key"
    key.chmod(0o644)
    assert "chmod 600" in run("verify", "--all").stderr
    key.unlink()
    for arguments in (("list",), ("verify", "--all")):
        ran = run(*arguments)
        assert ran.returncode == 2
        assert "no signing key" in ran.stderr
    assert not key.exists()


@pytest.mark.parametrize("arguments", [(), ("--all", "abc")])
def test_verify_wants_names_or_all(shop, arguments: tuple[str, ...]) -> None:
    _, _, run = shop
    ran = run("verify", *arguments)
    assert ran.returncode == 2
    assert "--all" in ran.stderr


def test_names_from_a_graph_draw_nothing(shop, tmp_path: Path) -> None:
    store, _, run = shop
    evil = kernel(3, "[bold]\x1b[2J\nx")
    store.put(evil.id, seal(evil, load_key(tmp_path / "data" / "kernel.key")))
    for arguments in (("list",), ("show", evil.id)):
        ran = run(*arguments)
        assert ran.returncode == 0, ran.stderr
        assert "\x1b" not in ran.stdout
        assert "[bold]" in ran.stdout


def test_nothing_of_it_needs_torch(shop) -> None:
    store, (one, *_), _ = shop
    code = (
        "import sys\n"
        "from esper.cli import app\n"
        "for line in (['list'], ['show', sys.argv[1]], ['verify', '--all']):\n"
        "    try: app(['kernels', *line], prog_name='esper')\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {"ESPER_KERNEL_KEY": str(store.folder.parent / "data" / "kernel.key")}
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, one.id],
        env={"PATH": "", **environment, "ESPER_KERNEL_STORE": str(store.folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
