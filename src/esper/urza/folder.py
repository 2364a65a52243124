"""A folder of containers, each under its kernel's id: ``ab/abcd….kernel``."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from esper.contracts import KernelStore
from esper.errors import KernelError

VARIABLE = "ESPER_KERNEL_STORE"
MAX_BYTES = 1 << 30  # of one container; read into memory at once
SUFFIX = ".kernel"
_ID = re.compile(r"[0-9a-f]{64}")
_SHELF = re.compile(r"[0-9a-f]{2}")
_OPEN = os.O_NOFOLLOW | os.O_CLOEXEC


def default_folder() -> Path:
    """Return where kernels are kept: ``$ESPER_KERNEL_STORE``, or ``~/.local/share/esper/kernels``."""
    return Path(os.environ.get(VARIABLE) or Path.home() / ".local" / "share" / "esper" / "kernels")


class FolderStore(KernelStore):
    """Keeps containers in a folder.

    Bytes are kept as they come: whether they are a sound container is for the reader to say, who treats one
    that is not as missing. A write is all or nothing and survives a power cut; of writers at once, the last
    one stays. Below the folder no symbolic link is followed.

    Args:
        folder: Path of the folder; created with the first container.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(os.path.abspath(folder))  # the process may go elsewhere

    def get(self, kernel: str) -> bytes | None:
        """Return a kernel's container, or None where there is none.

        Raises:
            KernelError: The id is not one, or there is a link, a pipe, too much or nothing readable there.
        """
        _require_id(kernel)
        try:
            with _opened(self.folder / kernel[:2]) as shelf:
                # O_NONBLOCK: a pipe in a file's place never answers.
                handle = os.open(kernel + SUFFIX, os.O_RDONLY | os.O_NONBLOCK | _OPEN, dir_fd=shelf)
            with os.fdopen(handle, "rb") as file:
                facts = os.fstat(handle)
                if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_BYTES:
                    raise KernelError(f"{self.folder} holds no file, or one over 1 GiB, as kernel {kernel}")
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _refusal(f"cannot read kernel {kernel} from {self.folder}", error) from None

    def put(self, kernel: str, container: bytes) -> None:
        """Keep a container; what was there under this id is replaced.

        Raises:
            KernelError: The id is not one, or the folder cannot be written; what was there is untouched.
        """
        _require_id(kernel)
        shelf_path = self.folder / kernel[:2]
        try:
            new = not shelf_path.exists()
            shelf_path.mkdir(parents=True, exist_ok=True)
            with _opened(shelf_path) as shelf:
                _write(shelf, kernel + SUFFIX, container)
            if new:
                with _opened(self.folder, follow=True) as folder:
                    os.fsync(folder)
        except OSError as error:
            raise _refusal(f"cannot keep kernel {kernel} in {self.folder}", error) from None

    def ids(self) -> list[str]:
        """List the kernels kept, sorted.

        Raises:
            KernelError: The folder cannot be read, or a link stands in it.
        """
        found: list[str] = []
        try:
            shelves = [name for name in os.listdir(self.folder) if _SHELF.fullmatch(name)]
            for name in shelves:
                with _opened(self.folder / name) as shelf:
                    found += [entry for entry in os.listdir(shelf) if entry.startswith(name)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _refusal(f"cannot list the kernels in {self.folder}", error) from None
        ids = (entry.removesuffix(SUFFIX) for entry in found if entry.endswith(SUFFIX))
        return sorted(name for name in ids if _ID.fullmatch(name))


def _require_id(kernel: str) -> None:
    if not _ID.fullmatch(kernel):
        raise KernelError(f"{kernel[:80]!r} is no kernel's id: 64 digits of 0-9a-f")


@contextmanager
def _opened(folder: Path, follow: bool = False) -> Iterator[int]:
    """Open a folder, so that what is done in it cannot be led elsewhere by a link put in its place."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | (os.O_CLOEXEC if follow else _OPEN))
    try:
        yield handle
    finally:
        os.close(handle)


def _write(shelf: int, name: str, content: bytes) -> None:
    draft = f".{name}.{secrets.token_hex(8)}"
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN, 0o644, dir_fd=shelf)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(draft, name, src_dir_fd=shelf, dst_dir_fd=shelf)
    except OSError:
        os.unlink(draft, dir_fd=shelf)
        raise
    os.fsync(shelf)


def _refusal(what: str, error: OSError) -> KernelError:
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return KernelError(f"{what}: a link or a file stands in a folder's or a file's place; remove it")
    return KernelError(f"{what}: {error.strerror}")
