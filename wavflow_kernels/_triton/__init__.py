"""Triton kernels and their launchers, one module an op; imported when first launched."""
