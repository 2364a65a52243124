"""Where checkpoints go, as people write it: a folder's path, or a URL."""

from __future__ import annotations

import re
from pathlib import Path

from esper.errors import ConfigError
from esper.registry import Registry
from esper.storage.bucket import BlobStorage
from esper.storage.folder import FolderStorage
from esper.storage.protocol import Storage

STORES = Registry("esper.urza.blobs", group="esper.blobs")
_URL = re.compile(r"([a-z][a-z0-9_]*)://(.*)", re.DOTALL)


def storage_at(place: Storage | str | Path) -> Storage:
    """Return the storage a place means; one that is a storage already is itself.

    Args:
        place: A folder's path, or a URL like ``s3://bucket/prefix``, of which the part before ``://`` is the
            name of a file in ``urza/blobs`` or of another package's entry point in ``esper.blobs``.

    Raises:
        RegistryError: The URL is of a kind that nobody knows.
        MissingExtraError: Its kind needs a package that is not installed.
        ConfigError: It is not a URL of its kind.
    """
    if not isinstance(place, str | Path):
        if not hasattr(place, "put"):
            raise ConfigError(f"checkpoints go to a folder, a URL or a Storage, not to {place!r:.80}")
        return place
    url = _URL.fullmatch(place) if isinstance(place, str) else None
    if url is None:
        return FolderStorage(place)
    return BlobStorage(STORES.get(url[1]).at(url[2]))
