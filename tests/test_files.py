"""Files nobody vouches for: only regular ones, up to a size, and nothing is waited for."""

import os
import socket
import time
from pathlib import Path

import pytest

from esper.errors import RunError
from esper.files import read_regular


def read(path: object, **more: bool) -> bytes:
    return read_regular(path, limit=10, what="the file", error=RunError, **more)


def test_a_regular_file_up_to_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to("file")
    assert read(tmp_path / "file") == read(str(tmp_path / "link")) == b"0123456789"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("larger", "it has more than 10 bytes, the most that is read"),
        ("pipe", "it is a pipe; give a regular file"),
        ("linked_pipe", "it is a pipe; give a regular file"),
        ("socket", "No such device or address"),
        ("/dev/zero", "it is a device; give a regular file"),
        (".", "it is a folder; give a regular file"),
        ("none", "No such file or directory"),
        ("loop", "Too many levels of symbolic links"),
        ("x" * 5000, "File name too long"),
        ("\0", "embedded null byte"),
        (3.5, "float"),
    ],
)
def test_the_rest_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: object, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("larger").write_bytes(b"x" * 11)
    os.mkfifo("pipe")
    Path("linked_pipe").symlink_to("pipe")
    Path("loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        begun = time.monotonic()
        with pytest.raises(RunError, match=r"cannot read the file .*: ") as raised:
            read(place)
    assert said in str(raised.value)
    assert len(str(raised.value)) < 300
    assert time.monotonic() - begun < 1


def test_a_link_is_refused_where_the_file_itself_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(RunError, match="it is a link; put the file itself there"):
        read(tmp_path / "link", follow=False)
