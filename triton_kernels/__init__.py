"""Triton kernels: one module per engine, with a launcher for each op, named as the op."""
