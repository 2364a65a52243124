"""Urza keeps: kernels in folders, addressed by what they are, and blobs in buckets."""
