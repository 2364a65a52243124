"""One run of the model, written down: calls, axes, regions, FLOPs."""
