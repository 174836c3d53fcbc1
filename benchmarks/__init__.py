"""Every op beside its peers, in one process; ``python -m custom_ops bench``."""
