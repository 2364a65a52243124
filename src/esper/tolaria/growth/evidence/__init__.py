"""What an event reads: training batches kept for it, and held-out examples."""
