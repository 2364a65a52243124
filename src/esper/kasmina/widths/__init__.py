"""Widths that can grow: each kind of producer and consumer, and the kernel built from them."""
