"""Starts the S3 server for the tests that need one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BUCKET = "esper-tests"
ACCOUNT = {"AWS_ACCESS_KEY_ID": "AKIAVISIBLE", "AWS_SECRET_ACCESS_KEY": "hush-hush"}


@contextmanager
def s3_server() -> Iterator[str]:
    """Serve one bucket; gives the endpoint."""
    command = [sys.executable, str(Path(__file__).with_name("s3_server.py")), BUCKET]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        endpoint = server.stdout.readline().strip()
        assert endpoint.startswith("http://127.0.0.1:"), endpoint
        try:
            yield endpoint
        finally:
            server.stdin.close()
            server.wait(20)
