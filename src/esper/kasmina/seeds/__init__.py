"""A seed at its site: state, layer, kernels on the device."""
