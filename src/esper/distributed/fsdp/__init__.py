"""FSDP2: its private names, and a model made plain and sharded again."""
