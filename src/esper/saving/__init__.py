"""A grown model as files: its genome, and what rebuilds it without Esper."""
