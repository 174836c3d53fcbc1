"""Triton kernels: one module per op family, each with a launcher per op, named as the op."""
