"""Evidence for the ops of `custom_ops.voxel`, one module beside each of theirs; read by `custom_ops.registry`."""
