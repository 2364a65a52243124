"""The incubating recipe on its way: decisions, processes, memory, forged kernels."""
