"""Programs for those who work on the kernels: compile them for GPUs, tune them, time them."""
