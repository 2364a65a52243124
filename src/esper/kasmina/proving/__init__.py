"""Every place is grown on copies before it is offered."""
