"""From a config file to a run: read, resolved, begun, resumed, stopped."""
