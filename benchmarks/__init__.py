"""One file per promise: each prints what it measured beside what was promised, and exits 1 on a miss."""
