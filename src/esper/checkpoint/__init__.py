"""Checkpoints: a run's whole state, kept so that a kill at any instant loses steps and nothing else."""

from esper.checkpoint.checkpoints import CheckpointManager
from esper.checkpoint.contents.batches import Batches
from esper.checkpoint.contents.run import Run
from esper.storage.address import storage_at
from esper.storage.bucket import BlobStorage, BlobStore
from esper.storage.folder import FolderStorage
from esper.storage.protocol import MemoryStorage, Storage

__all__ = [
    "Batches",
    "BlobStorage",
    "BlobStore",
    "CheckpointManager",
    "FolderStorage",
    "MemoryStorage",
    "Run",
    "Storage",
    "storage_at",
]
