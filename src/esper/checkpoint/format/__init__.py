"""What a checkpoint is on disk: manifest, encoding, checks, shards."""
