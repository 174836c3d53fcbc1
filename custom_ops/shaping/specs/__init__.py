"""Evidence for the ops of `custom_ops.shaping`, one module beside each of theirs; read by `custom_ops.registry`."""
