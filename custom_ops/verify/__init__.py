"""The battery: checks that an op composes with all of PyTorch, for this package's ops and for any other.

For a user's own op, call `verify`:

    >>> import torch
    >>> from custom_ops.verify import Sample, verify
    >>> x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    >>> report = verify(torch.sin, [Sample((x,), dynamic={0: 0})], reference=torch.sin, only=["value", "vmap"])
    >>> report.raise_on_failure()

``test_sine = matrix(torch.sin, samples)`` makes pytest tests of it. The command line has
``python -m custom_ops verify module:function --samples module:samples`` and, for the ops of this package,
``python -m custom_ops verify``. `capabilities` lists the checks, `BACKENDS` the backends, and `VALUES` the kinds of
values that `random_sample` draws from. A new check is one function decorated with ``capability`` in a module of this
folder.
"""

from custom_ops.registry import BadCall, OpInfo, Sample

# Importing these modules adds their rows to the matrix, in this order.
from custom_ops.verify import _values, _derivatives, _effects, _tracing, _objects, _sharding  # noqa: F401 isort: skip
from custom_ops.verify._backends import BACKENDS, backend
from custom_ops.verify._case import NotApplicable
from custom_ops.verify._cli import main
from custom_ops.verify._fuzz import VALUES, check, random_sample, script
from custom_ops.verify._pytest import matrix
from custom_ops.verify._report import Cell, Report
from custom_ops.verify._run import capabilities, verify

__all__ = [
    "BACKENDS",
    "VALUES",
    "BadCall",
    "Cell",
    "NotApplicable",
    "OpInfo",
    "Report",
    "Sample",
    "backend",
    "capabilities",
    "check",
    "main",
    "matrix",
    "random_sample",
    "script",
    "verify",
]
