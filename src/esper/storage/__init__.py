"""Where runs keep files: one contract, folders, buckets, leases, atomic replacement."""
