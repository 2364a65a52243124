"""Checkpoints: a run's whole state, kept so that a kill at any instant loses steps and nothing else."""

from esper.tolaria.checkpoint.batches import Batches
from esper.tolaria.checkpoint.blobs import BlobStorage, BlobStore
from esper.tolaria.checkpoint.checkpoints import CheckpointManager
from esper.tolaria.checkpoint.folder import FolderStorage
from esper.tolaria.checkpoint.places import storage_at
from esper.tolaria.checkpoint.run import Run
from esper.tolaria.checkpoint.storage import MemoryStorage, Storage

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
