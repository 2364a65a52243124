"""The early recipe: a few events, all places at once, judged afterwards."""
