"""The key containers are signed with: one file of 32 random bytes, outside the store, for its owner only."""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from esper.errors import KernelError

VARIABLE = "ESPER_KERNEL_KEY"
KEY_BYTES = 32  # as many as HMAC-SHA256 can use


def key_path() -> Path:
    """Return where the key is: ``$ESPER_KERNEL_KEY``, or ``~/.local/share/esper/kernel.key``."""
    return Path(os.environ.get(VARIABLE) or Path.home() / ".local" / "share" / "esper" / "kernel.key")


def load_key(path: Path | None = None, *, store: Path | None = None, create: bool = False) -> bytes:
    """Read the signing key.

    Args:
        path: Path of the key's file; None: ``key_path()``.
        store: Folder of the containers; a key inside it would travel with them and is refused.
        create: True to make a new key where there is none; of several processes at once, all get the
            same one.

    Raises:
        KernelError: There is no key, it is a link, others may read it, another user owns it, it is not 32
            bytes, or it is inside the store.
    """
    place = path or key_path()
    if store is not None and place.resolve().is_relative_to(store.resolve()):
        raise KernelError(f"the key {place} is inside the store {store}; keep it elsewhere: {VARIABLE}=FILE")
    try:
        return _read(place)
    except FileNotFoundError:
        if not create:
            raise KernelError(
                f"no signing key at {place}; the first kernel that is kept makes one, or set {VARIABLE}=FILE"
            ) from None
    except OSError as error:
        raise _refusal(place, error) from None
    try:
        _create(place)
        return _read(place)
    except OSError as error:
        raise _refusal(place, error) from None


def sign(key: bytes, *pieces: bytes | memoryview) -> bytes:
    """Return the HMAC-SHA256 of the pieces, one after the other.

    Raises:
        KernelError: The key is shorter than 32 bytes.
    """
    if len(key) < KEY_BYTES:
        raise KernelError(f"a signing key has at least {KEY_BYTES} bytes, this one {len(key)}")
    signature = hmac.new(key, digestmod=hashlib.sha256)
    for piece in pieces:
        signature.update(piece)
    return signature.digest()


def _read(place: Path) -> bytes:
    # Checked on the open file, so that it cannot be exchanged in between; O_NONBLOCK: a pipe never answers.
    handle = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise KernelError(f"the key {place} is not a file")
        if facts.st_mode & 0o077:
            raise KernelError(f"others may use the key {place}; make a new one, or: chmod 600 {place}")
        if facts.st_uid != os.geteuid():
            raise KernelError(f"the key {place} belongs to another user; use your own: {VARIABLE}=FILE")
        key = os.read(handle, KEY_BYTES + 1)
    finally:
        os.close(handle)
    if len(key) != KEY_BYTES:
        raise KernelError(f"the key {place} is damaged: a key has {KEY_BYTES} bytes; restore or remove it")
    return key


def _create(place: Path) -> None:
    """Write a key beside its place, whole, then give it its name; who comes second uses the first's."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = place.with_name(f".{place.name}.{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, place)  # fails where a key exists, as O_EXCL does; a rename would replace it
        except FileExistsError:
            return
    finally:
        draft.unlink()


def _refusal(place: Path, error: OSError) -> KernelError:
    if error.errno == errno.ELOOP:
        return KernelError(f"the key {place} is a symbolic link; name the file itself: {VARIABLE}=FILE")
    return KernelError(f"cannot use the key {place}: {error.strerror}")
