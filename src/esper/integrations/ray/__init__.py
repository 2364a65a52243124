"""Work on a Ray cluster: kernels are built there (``forge``), and models trained (``train``)."""
