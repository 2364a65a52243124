"""Growth in many processes."""
