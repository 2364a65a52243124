"""What a checkpoint holds of a run, taken out and put back."""
