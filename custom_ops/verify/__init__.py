"""The battery: every promise of composability, checked for any op.

For a user's own op::

    from custom_ops.verify import Sample, verify

    report = verify(my_op, [Sample((x, 2.0), dynamic={0: 0})], reference=my_reference)
    report.raise_on_failure()

and for the ops of this package ``python -m custom_ops verify``. `capabilities` lists what is checked.
A new check is one function decorated with ``capability`` in a module of this folder.
"""

from custom_ops.registry import BadCall, OpInfo, Sample

# Importing them fills the matrix, in this order.
from custom_ops.verify import _values, _derivatives, _tracing, _objects  # noqa: F401 isort: skip
from custom_ops.verify._backends import BACKENDS, backend
from custom_ops.verify._cli import main
from custom_ops.verify._fuzz import VALUES, check, random_sample, script
from custom_ops.verify._report import Cell, Report
from custom_ops.verify._run import capabilities, verify

__all__ = [
    "BACKENDS",
    "VALUES",
    "BadCall",
    "Cell",
    "OpInfo",
    "Report",
    "Sample",
    "backend",
    "capabilities",
    "check",
    "main",
    "random_sample",
    "script",
    "verify",
]
