"""``python -m benchmarks.launches``: write docs/launches.md, what a CPU can tell of each op's work on a GPU.

The Triton kernels run under the interpreter. The page counts the launches, the variants that Triton would compile and
the bytes of the arguments, and lists the torch ops that would wait for the device, since a call with one can't be
captured in a CUDA graph. ``--write PAGE`` writes the page.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo import trace_rules
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks.floor import least_traffic
from benchmarks.goals import GOALS
from custom_ops.registry import REGISTRY, OpInfo, Sample, leaves
from custom_ops.verify._case import flatten

SIZES = (1, 2, 3, 5)  # the factors by which a sample's dynamic dimensions grow
ELEMENTS = 1024  # the approximate size of the largest tensor where bytes are counted

HEAD = [
    "# Launches",
    "",
    "Written by `make docs` from `python -m benchmarks.launches`, which runs the Triton kernels under the "
    "interpreter; nothing here was measured on a GPU. Each row shows the op's first sample with a dynamic size, "
    f"in float32 and grown to about {ELEMENTS:,} elements. It has the launches of our kernels in forward and in "
    "backward; the calls of torch's own kernels beside them in forward; the number of variants that Triton "
    "compiles on the first call (other sizes add at most two for each kernel, for multiples of 16 and for other "
    "sizes); the bytes of the launches' tensors, as a multiple of the least that must be moved; and the torch ops"
    " on the way that wait for the device or copy from the host, which keep the call out of a CUDA graph.",
    "",
    "| op | forward | backward | torch's | compiled | bytes × least | waits |",
    "|---|--:|--:|--:|--:|--:|---|",
]

AIMS = [
    "",
    "## Goals on an H200",
    "",
    "The goals are upper limits of an op's forward and backward time at the largest size of each table, in units of "
    "the time of the contender beside it. A limit of 1.18 times the floor is 85% of the bandwidth of a copy. `python "
    "-m benchmarks --device cuda` says which goals are met. None has been measured yet.",
    "",
    "| op | beside | at most | |",
    "|---|---|--:|---|",
]

# These ops wait for the device, as their output's size or value is needed on the host.
WAITS = {
    "_local_scalar_dense", "bincount", "equal", "is_nonzero", "masked_select", "nonzero", "repeat_interleave",
    "unique_consecutive", "unique_dim", "_unique", "_unique2",
}  # fmt: skip
COPIES: dict[str, Any] = {"tensor": torch, "as_tensor": torch, "new_tensor": Tensor, "tolist": Tensor}


@dataclass(frozen=True)
class Launch:
    """One launch; ``compiled`` is the key of Triton's compilation: the kernel, its constants and each argument's
    properties.
    """

    compiled: tuple[Any, ...]
    bytes: int


class Trace(TorchDispatchMode):
    """A mode that records the kernels launched and the ops waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.waits: set[str] = set()
        self.calls: list[str] = []  # the names of torch's ops that ran a kernel of their own
        self.launching = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "custom_ops":
            with self:  # torch's ops inside of ours count too
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
        if func._opname in WAITS or (func._opname == "index" and any(t.dtype == torch.bool for t in flatten(args[1]))):
            self.waits.add(func._opname)
        nothing = ("empty", "_unsafe_view", "detach", "promote_types")
        if not func.is_view and not func._opname.removeprefix("new_").startswith(nothing):
            self.calls.append(func._opname)
        return func(*args, **(kwargs or {}))

    def copying(self, name: str, copy: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``copy`` so that calls from outside of the interpreter are recorded under ``name``."""

        def noted(value: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.launching and (name == "tolist" or not isinstance(value, Tensor)):
                self.waits.add(name)
            return copy(value, *args, **kwargs)

        return noted

    def run(self, kernel: Any, programs: int, args: Sequence[Any], variant: Any, launch: Callable[[], None]) -> None:
        from triton._C.libtriton import native_specialize_impl
        from triton.backends.compiler import BaseBackend

        if programs:
            plain = set(kernel.fn.kwargs["do_not_specialize"] or ())
            seen = [
                "" if isinstance(a, float) else native_specialize_impl(BaseBackend, a, False, name not in plain, True)
                for name, a in zip(kernel.fn.arg_names, args)
            ]
            held = {a.untyped_storage().data_ptr(): a.untyped_storage().nbytes() for a in args if isinstance(a, Tensor)}
            self.launches.append(Launch((kernel.name, variant, *seen), sum(held.values())))
        self.launching = True
        try:
            with _disable_current_modes():
                launch()
        finally:
            self.launching = False


@contextmanager
def tracing() -> Iterator[Trace]:
    """Record what runs within the context, on the Triton backend."""
    from custom_ops.triton_kernels.common import Kernel
    from custom_ops.verify import backend

    launch, trace = Kernel.__call__, Trace()
    trace_rules.lookup(torch.tensor)  # Dynamo lists torch's functions once, which must not be those below

    def traced(kernel: Kernel, programs: int, *args: Any, variant: Any = None) -> None:
        trace.run(kernel, programs, args, variant, partial(launch, kernel, programs, *args, variant=variant))

    with ExitStack() as stack:
        stack.enter_context(backend("triton"))
        stack.enter_context(patch.object(Kernel, "__call__", traced))
        for name, owner in COPIES.items():
            stack.enter_context(patch.object(owner, name, trace.copying(name, getattr(owner, name))))
        yield stack.enter_context(trace)


def call(info: OpInfo, sample: Sample) -> tuple[Any, Callable[[], Any]]:
    """Return the op's output on a sample, and a function that runs its backward."""
    output = info.function(*sample.args, **sample.kwargs)
    inputs = leaves([*sample.args, *sample.kwargs.values()])
    differentiable = [y for y in flatten(output) if y.requires_grad]
    return (
        output,
        lambda: (
            torch.autograd.grad([y.sum() for y in differentiable], inputs, allow_unused=True) if differentiable else ()
        ),
    )


def trace_of(info: OpInfo, sample: Sample) -> tuple[Trace, Trace]:
    """Return the trace of forward and that of backward."""
    with tracing() as forward:
        _, run = call(info, sample)
    with tracing() as backward:
        run()
    return forward, backward


def resized(sample: Sample, times: int) -> Sample:
    """Return the sample with its dynamic dimensions ``times`` as long."""

    def longer(key: int | str, value: Any) -> Any:
        if key not in sample.dynamic:
            return value
        return value.detach().repeat_interleave(times, sample.dynamic[key]).requires_grad_(value.requires_grad)

    args = tuple(longer(i, a) for i, a in enumerate(sample.args))
    return Sample(args, {k: longer(k, a) for k, a in sample.kwargs.items()}, sample.dynamic)


def samples(info: OpInfo) -> list[Sample]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return info.samples(torch.device("cpu"), torch.float32)


def row(info: OpInfo) -> str | None:
    """Return the op's row of the page, or None if it launches nothing."""
    sample = next((s for s in samples(info) if s.dynamic), samples(info)[0])
    given = [*sample.args, *sample.kwargs.values()]
    sample = resized(sample, max(1, ELEMENTS // max(a.numel() for a in given if isinstance(a, Tensor))))
    forward, backward = trace_of(info, sample)
    launches = forward.launches + backward.launches
    if not launches:
        return None
    arguments = (*sample.args, *sample.kwargs.values())
    least = sum(map(sum, least_traffic(arguments, call(info, sample)[0], leaves(arguments))))
    moved = sum(launch.bytes for launch in launches)
    compiled = {launch.compiled for launch in launches}
    counts = [len(forward.launches), len(backward.launches), len(forward.calls), len(compiled)]
    waits = ", ".join(f"`{name}`" for name in sorted(forward.waits | backward.waits))
    return f"| `{info.name}` | {' | '.join(map(str, counts))} | {moved / least:.2f} | {waits} |"


def page() -> str:
    rows = [line for line in map(row, REGISTRY.values()) if line]
    wanted = [
        f"| `{op}` | {peer} | {ratio:.2f} | not measured |"
        for op, of_op in GOALS.items()
        for peer, ratio in of_op.items()
    ]
    return "\n".join([*HEAD, *rows, *AIMS, *wanted]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="PAGE")
    options = parser.parse_args(argv)
    text = page()
    print(text, end="")
    if options.write:
        options.write.write_text(text)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it at import
    raise SystemExit(main())
