"""Surgery: optimizers and averaged copies follow a widening of the model."""
