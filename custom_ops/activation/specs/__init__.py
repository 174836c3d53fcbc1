"""Specs of the ops of `custom_ops.activation`, one module for each of theirs; `custom_ops.registry` loads them."""
