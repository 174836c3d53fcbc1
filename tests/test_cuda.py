"""CUDA graphs, streams and a second device, with every op, in a process in which Triton compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.launches import resized
from custom_ops.registry import FUNCTIONS, OpInfo, Sample

WAITING = {"voxels_summing": "the number of voxels, its output's rows, has to be known on the host"}


def samples(info: OpInfo, device: str) -> list[Sample]:
    torch.manual_seed(0)
    return info.samples(torch.device(device), torch.float32)


def tensors(sample: Sample) -> list[torch.Tensor]:
    return [a for a in [*sample.args, *sample.kwargs.values()] if isinstance(a, torch.Tensor)]


def results(info: OpInfo, sample: Sample) -> list[torch.Tensor]:
    """Return values and gradients."""
    outputs = info.function(*sample.args, **sample.kwargs)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    inputs = [t for t in tensors(sample) if t.requires_grad]
    connected = [y for y in outputs if y.requires_grad]
    grads = torch.autograd.grad([y.square().sum() for y in connected], inputs, allow_unused=True) if connected else ()
    return [t.detach() for t in [*outputs, *grads] if t is not None]


def same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def halve(sample: Sample) -> None:
    with torch.no_grad():
        for t in tensors(sample):
            if t.is_floating_point() and t.requires_grad:
                t.mul_(0.5)


def a_graph_replays(info: OpInfo) -> None:
    """Check that a replayed graph gives, on new values, what the op gives without a graph."""
    for sample in samples(info, "cuda"):
        if info.name == "voxel_rank" and not isinstance(sample.args[1], torch.Tensor):
            continue  # its grid is given as numbers, which are copied from the host
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                results(info, sample)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = results(info, sample)
        for _ in range(2):
            graph.replay()
            same(captured, results(info, sample))
            halve(sample)


def reduced_overhead_is_the_same(info: OpInfo) -> None:
    sample = samples(info, "cuda")[0]
    compiled = replace(info, function=torch.compile(info.function, mode="reduce-overhead"))
    for _ in range(4):  # warm-up, capture, and two replays
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(results(compiled, sample), results(info, sample), equal_nan=True)
        halve(sample)


def the_current_stream_is_used(info: OpInfo) -> None:
    """Check that the op runs on the current stream. Its inputs are written late there, so another stream reads them
    early.
    """
    for sample in samples(info, "cuda"):
        wanted = results(info, sample)
        torch.cuda.synchronize()
        written = [t for t in tensors(sample) if t.is_floating_point() and t.requires_grad]
        values = [t.detach().clone() for t in written]
        with torch.no_grad():
            for t in written:
                t.zero_()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            with torch.no_grad():
                for t, value in zip(written, values):
                    t.copy_(value)
            found = results(info, sample)
        stream.synchronize()
        same(found, wanted)


def another_device_than_the_current_one(info: OpInfo) -> None:
    for here, there in zip(samples(info, "cuda:0"), samples(info, "cuda:1")):
        with torch.no_grad():
            for a, b in zip(tensors(here), tensors(there)):
                b.copy_(a)
        with torch.cuda.device(0):
            found = results(info, there)
        assert {t.device for t in found} <= {torch.device("cuda:1")}
        same([t.cpu() for t in found], [t.cpu() for t in results(info, here)])


def new_sizes_compile_little(info: OpInfo) -> None:
    """Check that new sizes add at most two compilations per kernel: for multiples of 16 and for other sizes."""
    from custom_ops.triton_kernels.common import KERNELS

    def compiled() -> dict[str, int]:
        return {k.name: sum(len(caches[0]) for caches in k.fn.device_caches.values()) for k in KERNELS}

    sample = next((s for s in samples(info, "cuda") if s.dynamic), None)
    if sample is None:
        return
    for times in (2, 16):
        results(info, resized(sample, times))
    before = compiled()
    for times in (3, 5, 6, 7, 9, 32, 48):
        results(info, resized(sample, times))
    more = {name: count - before[name] for name, count in compiled().items() if count > before[name] + 2}
    assert not more, more


def of_every_op(check: str, but: dict[str, str]) -> None:
    """Run the check on every op; this needs a process of its own."""
    failures = {}
    for name, info in FUNCTIONS.items():
        if name not in but:
            try:
                globals()[check](info)
            except Exception as error:
                failures[name] = f"{type(error).__name__}: {str(error)[:500]}"
    assert not failures, "\n\n".join(f"{name}: {what}" for name, what in failures.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "check",
    [
        "a_graph_replays",
        "reduced_overhead_is_the_same",
        "the_current_stream_is_used",
        "new_sizes_compile_little",
        pytest.param(
            "another_device_than_the_current_one",
            marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device"),
        ),
    ],
)
def test_every_op(check: str) -> None:
    but = WAITING if check in ("a_graph_replays", "reduced_overhead_is_the_same") else {}
    path, environment = Path(__file__).parent, {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = f"import sys; sys.path.insert(0, {str(path)!r}); import test_cuda as t; t.of_every_op({check!r}, {but})"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
