"""The specs of the ops of `custom_ops.ranking`, one module beside each of theirs; read by `custom_ops.registry`."""
