"""``esper checkpoints`` and a URL: a bucket is a place like a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from esper.checkpoint import FolderStorage, storage_at
from esper.cli import app
from esper.saving.save import load_into
from tests.checkpoint.killable import host
from tests.urza.blobs.serving import ACCOUNT, BUCKET, s3_server

GOLDEN = Path(__file__).parents[1] / "checkpoint" / "golden"


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["checkpoints", *map(str, arguments)])
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_a_bucket_is_a_place_like_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), "/dev/null")
    for name, value in {**ACCOUNT, **files}.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{BUCKET}/run/checkpoints"
    with s3_server() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        folder, bucket = FolderStorage(GOLDEN), storage_at(url)
        for name in folder.names():
            parts = sorted(path.name for path in (GOLDEN / name).iterdir())
            bucket.put(name, {part: [folder.get(name, part)] for part in parts})
        assert f"2 of 2 checkpoints in {url} are sound" in run("verify", url)
        assert "step-00000063" in run("list", url)
        run("prune", url, "--keep", 1)
        assert bucket.names() == ["step-00000063"]
        run("export", url, tmp_path / "grown")
    assert load_into(host(), tmp_path / "grown") is not None
