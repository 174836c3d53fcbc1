"""Our ranking losses and metrics in the training loops of other packages.

`custom_ops` depends on none of them; each module imports the package of its own name:

- `custom_ops.adapters.sentence_transformers`: losses for ``CrossEncoderTrainer`` and ``SentenceTransformerTrainer``
- `custom_ops.adapters.trl`: ``DPOTrainer``
- `custom_ops.adapters.torchmetrics`: metrics with ``update`` and ``compute``
- `custom_ops.adapters.allrank`: losses for ``fit``
"""
