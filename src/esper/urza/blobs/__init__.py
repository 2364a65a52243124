"""Stores of bytes. The file's name is the scheme of its URLs: ``s3://bucket/prefix``."""
