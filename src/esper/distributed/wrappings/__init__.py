"""What may stand around a model: a file each, imported where it is met; FSDP takes 2 s to import."""
