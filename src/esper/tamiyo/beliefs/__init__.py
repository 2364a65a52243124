"""What is believed of arms: their own means, or lines over their features."""
