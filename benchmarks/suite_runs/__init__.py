"""How the suite's tasks are run and judged: one training, the arms, the joining of parts, the picture."""
