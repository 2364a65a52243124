"""What a batch is: its layout, its examples, and what is held out of it."""
