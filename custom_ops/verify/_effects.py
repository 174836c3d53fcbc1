"""Special values, and an op's side effects: on the process, on memory, and on calls in other threads."""

from __future__ import annotations

import gc
import random
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from custom_ops.registry import Sample
from custom_ops.verify._case import (
    Call,
    Case,
    NotApplicable,
    capability,
    check_close,
    describe,
    grads,
    randn_like,
)
from custom_ops.verify._fuzz import VALUES, check
from custom_ops.verify._values import grown

KINDS = ("NaN", "infinite", "tiny")


@capability("special values")
def special_values(case: Case) -> str | None:
    """NaN, infinities and numbers near underflow, in each input and in all, give the reference's results."""
    if case.info.reference is None:
        raise NotApplicable("no reference given")
    kinds = [kind for kind in KINDS if kind not in case.info.not_fuzzed]
    refused = 0
    for dtype in [d for d in (torch.float64, torch.float32) if d in case.info.dtypes][: 1 if case.sparing else 2]:
        for call in case.calls(dtype):
            for kind in kinds:
                for sample in _with_values(call, kind):
                    try:
                        check(case.info, sample)
                    except AssertionError as error:
                        raise AssertionError(f"with values {kind}: {error}") from None
                    except Exception:  # an error isn't a silently wrong result
                        refused += 1
    left_out = [f"{kind}: {case.info.not_fuzzed[kind]}" for kind in KINDS if kind not in kinds]
    return "; ".join([*left_out, *([f"{refused} calls are refused"] if refused else [])]) or None


def _with_values(call: Call, kind: str) -> Iterator[Sample]:
    """Yield the call with such values in all inputs, and in each input alone."""
    if call.is_empty or not call.input_keys:
        return
    generator = torch.Generator().manual_seed(7)
    new = {}
    for key, x in zip(call.input_keys, call.inputs):
        drawn = VALUES[kind](x.shape, x.dtype, generator).to(x)
        # The other elements keep the sample's values, which are in the op's domain.
        special = torch.ones_like(x, dtype=torch.bool) if kind == "tiny" else ~drawn.isfinite()
        if kind != "tiny":
            drawn.view(-1)[0], special.view(-1)[0] = torch.nan if kind == "NaN" else torch.inf, True
        new[key] = torch.where(special, drawn, x.detach()).requires_grad_()
    choices = [tuple(new)] + ([(key,) for key in new] if len(new) > 1 else [])
    for chosen in choices:
        yield call.with_tensors([new[key] for key in chosen], chosen).sample


# --- the process -------------------------------------------------------------------------------


def _settings() -> dict[str, Any]:
    denormal = torch.full((1,), 5e-324, dtype=torch.float64)
    return {
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.get_default_device()": torch.get_default_device(),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.is_inference_mode_enabled()": torch.is_inference_mode_enabled(),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.get_deterministic_debug_mode()": torch.get_deterministic_debug_mode(),
        "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision(),
        "torch.is_autocast_enabled('cpu')": torch.is_autocast_enabled("cpu"),
        "torch.set_flush_denormal": bool((denormal * 1 == 0).all()),
        "the filters of warnings": list(warnings.filters),
        "Python's random numbers": random.getstate(),
        "NumPy's random numbers": repr(sys.modules["numpy"].random.get_state()) if "numpy" in sys.modules else None,
    }


@capability("global state", of_dispatch=True)
def global_state(case: Case) -> str | None:
    """Forward and backward leave the default dtype, modes, threads and random numbers of the process as they were."""
    draws = False
    for call in case.calls():
        before, default = _settings(), torch.get_default_dtype()
        generator = torch.get_rng_state()
        after: dict[int, list[Tensor]] = {}
        try:
            for seed in (1, 1, 2):
                torch.manual_seed(seed)
                start = torch.get_rng_state()
                _forward_backward(call)
                after.setdefault(seed, []).append(torch.get_rng_state())
                draws = draws or not torch.equal(start, after[seed][-1])
            found = _settings()
        finally:
            torch.set_default_dtype(default)
            torch.set_rng_state(generator)
        changed = [name for name, value in before.items() if found[name] != value]
        if changed:
            raise AssertionError(f"{describe(call)} changes {', '.join(changed)}")
        if torch.equal(after[1][0], after[2][0]):
            raise AssertionError(f"{describe(call)} seeds torch's random numbers anew")
        if not torch.equal(*after[1]):
            raise AssertionError(f"{describe(call)} leaves torch's random numbers otherwise than the seed says")
    return "draws random numbers" if draws else None


def _forward_backward(call: Call) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return fresh inputs, the outputs, and the gradients."""
    inputs = call.inputs
    outputs = call.with_tensors(inputs, call.input_keys).run()
    differentiable = [y for y in outputs if y.requires_grad]
    if not differentiable:
        return inputs, outputs, []
    return inputs, outputs, grads(differentiable, inputs, randn_like(differentiable, seed=1))


# --- memory ------------------------------------------------------------------------------------


@capability("memory freed", of_dispatch=True)
def memory_freed(case: Case) -> None:
    """Inputs, outputs and gradients are freed with their last reference: no cycle or list keeps them."""
    for call in case.calls()[: 3 if case.quick else None]:
        for _ in range(2):
            _forward_backward(call)  # an op's caches exist after this
        enabled = gc.isenabled()
        gc.disable()
        try:
            gc.collect(0)  # an object that is young after this is new
            references = [reference for _ in range(_TIMES) for reference in _references(call)]
            kept = [name for name, ref in references if not ref.expired()]
            young = [weakref.ref(thing) for thing in gc.get_objects(generation=0) if issubclass(type(thing), Tensor)]
            if kept or young:
                gc.collect()
            still = [name for name, ref in references if not ref.expired()]
            grown_by = sum(reference() is not None for reference in young)
        finally:
            if enabled:
                gc.enable()
        if still:
            raise AssertionError(f"{describe(call)}: something keeps its {still[0]} for ever")
        if grown_by >= _TIMES:
            raise AssertionError(f"{describe(call)}: {_TIMES} calls leave {grown_by} more tensors")
        if kept and not case.interpreted:  # Triton's interpreter makes cycles of its own
            raise AssertionError(
                f"{describe(call)}: its {kept[0]} is in a reference cycle, and freed only by Python's collector"
            )


_TIMES = 4


def _references(call: Call) -> list[tuple[str, StorageWeakRef]]:
    """Run the call with and without a backward pass, and return weak references to its memory."""
    names = ("input", "output", "gradient", "output")
    forward = call.with_tensors(call.inputs, call.input_keys).run()  # no backward pass frees this graph
    own = {t.untyped_storage().data_ptr() for t in call.tensors}  # an output may be an argument's memory
    storages = [(name, t.untyped_storage()) for name, ts in zip(names, (*_forward_backward(call), forward)) for t in ts]
    return [(name, StorageWeakRef(s)) for name, s in storages if s.nbytes() and s.data_ptr() not in own]


@capability("saved memory", of_dispatch=True)
def saved_memory(case: Case) -> str:
    """Backward keeps at most a quarter more memory than the reference's, or than inputs and outputs take."""
    most = 0.0
    for call in case.differentiable_calls(torch.float32):
        big = grown(case, call)
        own, arguments = _saved(big)
        reference, _ = _saved(case.reference(big))
        allowed = 1.25 * max(reference, arguments) + 1024  # a few more numbers for each row are fine
        if own > allowed:
            raise AssertionError(
                f"{describe(big)} keeps {own} bytes for backward; the reference keeps {reference}, and inputs and "
                f"outputs have {arguments}"
            )
        most = max(most, own / arguments)
    return f"at most {most:.2f} of inputs and outputs"


def _saved(call: Call) -> tuple[int, int]:
    """Return the bytes kept for backward, and those of inputs and outputs."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # an output itself would be in a reference cycle

    inputs = call.inputs
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = call.with_tensors(inputs, call.input_keys).run()
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*inputs, *call.tensors, *outputs)}
    return sum(kept.values()), sum(own.values())


# --- threads -----------------------------------------------------------------------------------


@capability("threads", of_dispatch=True)
def threads(case: Case) -> str:
    """Several Python threads that call at once each get the results that they get alone."""
    if case.interpreted:
        raise NotApplicable("Triton's interpreter has one thread")
    calls = case.calls(torch.float32)[: 1 if case.quick else None]
    for call in [grown(case, call) for call in calls]:
        workers = [_spread(call, seed) for seed in range(_THREADS)]
        expected = [_results(worker) for worker in workers]
        barrier = threading.Barrier(_THREADS)
        failures: list[BaseException] = []
        run = [partial(_repeat, w, e, barrier, failures, describe(call)) for w, e in zip(workers, expected)]
        started = [threading.Thread(target=each, daemon=True) for each in run]
        interval = sys.getswitchinterval()
        try:
            sys.setswitchinterval(1e-5)
            for thread in started:
                thread.start()
            for thread in started:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        if failures:
            raise failures[0]
    return f"{_THREADS} threads"


_THREADS, _ROUNDS = 4, 4


def _spread(call: Call, seed: int) -> Call:
    """Return the call with other values of its inputs."""
    noise = randn_like(call.inputs, seed=seed)
    tensors = [(x.detach() * (1 + 0.05 * n)).requires_grad_() for x, n in zip(call.inputs, noise)]
    return call.with_tensors(tensors, call.input_keys)


def _results(call: Call) -> list[Tensor]:
    _, outputs, gradients = _forward_backward(call)
    return [t.detach() for t in (*outputs, *gradients)]


def _repeat(
    call: Call, expected: Sequence[Tensor], barrier: threading.Barrier, failures: list[BaseException], what: str
) -> None:
    try:
        barrier.wait()
        for _ in range(_ROUNDS):
            check_close(_results(call), expected, f"{what} while other threads call it", rtol=1e-5)
    except BaseException as error:
        failures.append(error)
        barrier.abort()
