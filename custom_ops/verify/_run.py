"""Running the matrix."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from custom_ops.library._torch import compiled_afresh, operators_of
from custom_ops.registry import BadCall, OpInfo, Sample
from custom_ops.verify._backends import EMULATED
from custom_ops.verify._backends import backend as on_backend
from custom_ops.verify._case import (
    CAPABILITIES,
    Call,
    Capability,
    Case,
    NotApplicable,
    NotChecked,
    explain,
    refuse_wrong,
)
from custom_ops.verify._effects import settings_kept
from custom_ops.verify._report import FAIL, NOT_APPLICABLE, NOT_CHECKED, PASS, Cell, Report
from custom_ops.verify._values import dynamic_dimensions

Calls = Sequence[Sample | tuple[Any, ...]]
Sampler = Callable[[torch.device, torch.dtype], list[Sample]]
Samples = Calls | Callable[[torch.device, torch.dtype], Calls]


def verify(
    op: Callable[..., Any] | OpInfo,
    sample_inputs: Samples | None = None,
    *,
    reference: Callable[..., Any] | None = None,
    apply: Callable[..., Any] | None = None,
    modules: Callable[[], list[tuple[torch.nn.Module, dict[str, Any]]]] = list,
    bad_calls: Callable[[], list[BadCall]] = list,
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    differentiable: bool = True,
    autocast: torch.dtype | None = None,
    not_applicable: dict[str, str] | None = None,
    not_comparable: dict[str, str] | None = None,
    name: str | None = None,
    backend: str = "cpp",
    quick: bool = False,
    only: Iterable[str] | None = None,
    on_cell: Callable[[Cell], None] | None = None,
) -> Report:
    """Check an op, or any function of tensors, against the whole capability matrix.

    Args:
        op: the function as its users call it: a registered op, or a Python function that calls some; or
            the `OpInfo` of an op of this package, which brings all of the rest.
        sample_inputs: the calls to make: a list of `Sample` or of tuples of arguments, with float64 tensors,
            ``requires_grad`` where they are differentiated; or a function of a device and a dtype that returns such
            a list. Small tensors, away from kinks (finite differences are taken), covering the edge cases.
            A `Sample` also names its dynamic dimensions; if none does, `verify` tries which ones can vary.
        reference: the same function in plain PyTorch. Without it derivatives are compared
            with finite differences and with each other only.
        apply: the ``autograd.Function.apply`` idiom of the same function.
        modules: returns pairs of a module and the keyword arguments of ``op`` that it stands for.
        bad_calls: returns wrong calls with the messages that they must raise.
        dtypes: the floating dtypes supported.
        differentiable: False if no sample requires grad; otherwise such samples leave the derivatives' rows unchecked.
        autocast: the dtype of the outputs under autocast: float32, or any 16-bit dtype for the one that autocast
            chooses.
        not_applicable: {capability: reason}. A second derivative declared not to exist must raise.
        not_comparable: {capability: reason} of rows that don't run, as finite differences can't see a shaped gradient.
        name: the op's name in the report; by default that of the operator or function.
        backend: "cpp" (the registered CPU kernels), "cuda", or for ops of this package "triton" or "ptx".
        quick: capture with ``aot_eager`` mostly, and skip AOTInductor. On the Triton backend also two samples in most
            rows (values, gradients, second derivatives and dtypes have all), three memory layouts, Jacobians and
            Hessians along two random directions of each input, finite differences without undefined gradients, fake
            kernels in float64 alone, batches of two over all tensors and over those differentiated in, and of opcheck
            what runs a kernel; on every backend large inputs are smaller. Numbers of threads aren't compared under the
            interpreter.
        only: the capabilities to check; all by default (`capabilities` lists them).
        on_cell: called with each `Cell` as it is done.

    Returns:
        A `Report`; ``verify(...).raise_on_failure()`` in a test.

    Raises:
        ValueError: an unknown capability or backend, no samples, tensors within a sample's lists or dicts, a sample
            that is neither a `Sample` nor a tuple, a dynamic dimension that no tensor has.
        RuntimeError: the backend can't run here.

    Example:
        >>> import torch
        >>> from custom_ops.verify import verify
        >>> x = torch.randn(3, dtype=torch.float64, requires_grad=True)
        >>> verify(torch.sin, [(x,)], reference=torch.sin, only=["value", "gradcheck", "vmap"]).ok
        True
    """
    if isinstance(op, OpInfo):
        info = op
    else:
        for argument, given in (("op", op), ("reference", reference)):
            if not (callable(given) or (given is None and argument == "reference")):
                raise ValueError(f"{argument}: expected a function, got {type(given).__name__}")
        calls = _listed(sample_inputs)
        info = OpInfo(
            name=name or next((o.name() for o in operators_of(op)), getattr(op, "__name__", str(op))),
            function=op,
            reference=reference,
            samples=calls if callable(calls) else _converter(op, calls),
            summary="",
            apply=apply,
            modules=modules,
            bad_calls=bad_calls,
            dtypes=tuple(dtypes),
            differentiable=differentiable,
            autocast=autocast,
            not_applicable=not_applicable or {},
            not_comparable=not_comparable or {},
        )
    return run(info, backend, quick, _chosen(only, quick, backend), {}, on_cell)


def run(
    info: OpInfo,
    backend: str,
    quick: bool,
    rows: Iterable[Capability],
    kept: dict[Any, Any],
    on_cell: Callable[[Cell], None] | None = None,
) -> Report:
    """Run `verify` on some rows, reusing what earlier runs of the op on this backend have ``kept``."""
    for function, declared in product(info.functions, ("not_applicable", "not_comparable")):
        unknown = getattr(function, declared).keys() - CAPABILITIES.keys()
        if unknown:
            raise ValueError(f"{declared}: unknown capabilities {sorted(unknown)}, see verify.capabilities()")
    report = Report()
    with on_backend(backend) as device:
        cases = [
            Case(function, device, quick, interpreted=backend in EMULATED, kept=kept) for function in info.functions
        ]
        for row in rows:
            cell = _cell(row, cases, backend)
            report.cells.append(cell)
            if on_cell is not None:
                on_cell(cell)
    return report


def capabilities(quick: bool = False, backend: str = "cpp") -> dict[str, str]:
    """Return {row: meaning} for all rows of the matrix or those of quick mode, and on "ptx" for the rows on numbers.

    Example:
        >>> from custom_ops.verify import capabilities
        >>> capabilities()["vmap"]
        'Without its fallback, vmap equals a Python loop: over each tensor and all, in any dimension, nested, of one.'
    """
    return {row.name: row.meaning for row in _chosen(None, quick, backend)}


def _chosen(only: Iterable[str] | None, quick: bool, backend: str) -> list[Capability]:
    if only is None:
        rows = CAPABILITIES.values()
        if backend == "ptx":
            return [row for row in rows if row.every_sample or not (quick or row.of_dispatch)]
        return [row for row in rows if not (quick and row.full_only)]
    names = list(only)
    for name in names:
        if name not in CAPABILITIES:
            raise ValueError(f"only: unknown capability {name!r}, expected some of {', '.join(CAPABILITIES)}")
    return [CAPABILITIES[name] for name in names]


def _cell(row: Capability, cases: Sequence[Case], backend: str) -> Cell:
    """Return the cell of the op, the first of the cases; it fails where one of its variants does."""
    start = time.perf_counter()
    op, *variants = cases
    status, detail = _outcome(row, op)
    for variant in variants if row.of_variants else ():
        if status != FAIL:
            found, why = _outcome(row, variant)
            if found in (FAIL, NOT_CHECKED):
                status, detail = found, f"{variant.info.name}: {why}"
    return Cell(op.info.name, backend, row.name, status, detail, time.perf_counter() - start)


def _outcome(row: Capability, case: Case) -> tuple[str, str]:
    if row.name in case.info.not_comparable:
        return NOT_APPLICABLE, case.info.not_comparable[row.name]
    reason = case.info.not_applicable.get(row.name)
    if reason is not None and not row.may_be_refused:
        return NOT_APPLICABLE, reason
    try:
        with warnings.catch_warnings(), compiled_afresh(), settings_kept():
            warnings.simplefilter("ignore")
            case.every_sample = row.every_sample
            remark = row.check(case)
    except NotChecked as unchecked:
        return NOT_CHECKED, str(unchecked)
    except NotApplicable as inapplicable:
        return NOT_APPLICABLE, str(inapplicable)
    except Exception as error:
        if reason is not None and not isinstance(error, AssertionError):
            return NOT_APPLICABLE, f"{reason} (raises {type(error).__name__})"
        return FAIL, explain(error)
    if reason is not None:
        return FAIL, f"declared not applicable ({reason}), yet it raises nothing"
    return PASS, remark or ""


def _listed(sample_inputs: Any) -> Calls | Sampler:
    """Return a function of a device and a dtype that was tried once, and anything else as a list."""
    if callable(sample_inputs):
        try:
            inspect.signature(sample_inputs).bind(torch.device("cpu"), torch.float64)
        except TypeError:
            raise ValueError("sample_inputs: expected a function of a device and a dtype, or a list") from None
        try:
            with settings_kept():
                made = sample_inputs(torch.device("cpu"), torch.float64)
        except Exception as error:
            raise ValueError(f"sample_inputs: the function raises {type(error).__name__}: {error}") from error
        if not isinstance(made, (list, tuple)):
            raise ValueError(f"sample_inputs: expected the function to return a list, got {type(made).__name__}")
        return lambda device, dtype: _as_samples(sample_inputs(device, dtype))
    if isinstance(sample_inputs, Tensor) or not isinstance(sample_inputs, (Iterable, type(None))):
        raise ValueError(f"sample_inputs: expected a list of calls, as [(x,)], got {type(sample_inputs).__name__}")
    samples = [] if sample_inputs is None else list(sample_inputs)
    if not samples:
        raise ValueError("sample_inputs: expected at least one sample")
    return samples


def _as_samples(given: Calls) -> list[Sample]:
    for i, s in enumerate(given):
        if not isinstance(s, (Sample, tuple)):
            expected = "expected a Sample or a tuple of arguments: [(x,)], not [x]"
            raise ValueError(f"sample_inputs: sample {i} is a {type(s).__name__}, {expected}")
    return [s if isinstance(s, Sample) else Sample(s) for s in given]


def _converter(function: Callable[..., Any], sample_inputs: Calls) -> Sampler:
    samples = _as_samples(sample_inputs)
    refuse_wrong(samples)
    if not any(s.dynamic for s in samples):
        with settings_kept():
            samples = [replace(s, dynamic=dynamic_dimensions(Call(function, s))) for s in samples]

    def convert(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor):
            return value
        moved = value.detach().to(device, dtype if value.is_floating_point() else value.dtype)
        return moved.requires_grad_(value.requires_grad)

    def make(device: torch.device, dtype: torch.dtype) -> list[Sample]:
        return [
            Sample(
                tuple(convert(a, device, dtype) for a in s.args),
                {k: convert(a, device, dtype) for k, a in s.kwargs.items()},
                s.dynamic,
            )
            for s in samples
        ]

    return make
