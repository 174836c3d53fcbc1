"""Special values, and an op's side effects: on the process, on memory, and on calls in other threads."""

from __future__ import annotations

import functools
import gc
import os
import random
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from custom_ops.library._torch import refuse_saved_tensors_hooks, saved_tensors_hooks_refused
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
    """NaN, infinities and numbers near underflow give the reference's results, and a NaN gradient is passed on."""
    if case.info.reference is None:
        raise NotApplicable("no reference given")
    kinds = [kind for kind in KINDS if kind not in case.info.not_fuzzed]
    refused = 0
    for dtype in [d for d in (torch.float64, torch.float32) if d in case.info.dtypes][: 1 if case.sparing else 2]:
        for call in case.calls(dtype):
            if call.input_keys and "NaN" in kinds:
                _check_nan_gradients(case, call)
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


def _check_nan_gradients(case: Case, call: Call) -> None:
    """Check that a NaN that comes in as gradient of one element of an output reaches all that this element depends on.

    The reference tells which these are, by a gradient that isn't 0. Where it is 0, formulas that are equivalent may
    differ, as 0 times NaN.
    """
    reference = case.reference(call)
    inputs, oracles = call.inputs, call.inputs
    outputs, expected = call(*inputs), reference(*oracles)
    for i, (y, e) in enumerate(zip(outputs, expected)):
        if not y.numel():
            continue
        one = e.new_zeros(e.shape)
        one.view(-1)[y.numel() // 2] = 1
        reached = grads([e], oracles, [one], retain_graph=True)
        found = grads([y], inputs, [torch.where(one == 1, torch.nan, one).to(y)], retain_graph=True)
        for j, (r, f) in enumerate(zip(reached, found)):
            if not f[r.isfinite() & (r != 0)].isnan().all():
                raise AssertionError(f"gradient {j} of {describe(call)}: a NaN in the gradient of output {i} is lost")


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
    return {name: get() for name, (get, _) in SETTINGS.items()}


_ABSENT = object()


def _numpy(name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a function of NumPy if that is imported."""
    module: Any = sys.modules.get("numpy")
    return functools.reduce(getattr, name.split("."), module)(*args, **kwargs) if module else _ABSENT


def _numpy_state() -> Any:
    state = _numpy("random.get_state")
    return state if state is _ABSENT else (state[0], state[1].tolist(), *state[2:])  # lists compare as a whole


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


def _flushes_denormals() -> bool:
    return bool((torch.full((1,), 5e-324, dtype=torch.float64) * 1 == 0).all())


def _flag(module: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return partial(getattr, module, name), partial(setattr, module, name)


# An op must leave these as they are; the functions get and set them.
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch.get_default_dtype()": (torch.get_default_dtype, torch.set_default_dtype),
    "torch.get_default_device()": (torch.get_default_device, torch.set_default_device),
    "torch.is_grad_enabled()": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch.get_num_threads()": (torch.get_num_threads, torch.set_num_threads),
    "torch.get_deterministic_debug_mode()": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    "torch.get_float32_matmul_precision()": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "torch.is_autocast_enabled('cpu')": (
        lambda: torch.is_autocast_enabled("cpu"),
        lambda enabled: torch.set_autocast_enabled("cpu", enabled),
    ),
    "torch.backends.mkldnn.enabled": _flag(torch.backends.mkldnn, "enabled"),
    "torch.backends.cudnn.enabled": _flag(torch.backends.cudnn, "enabled"),
    "torch.backends.cudnn.benchmark": _flag(torch.backends.cudnn, "benchmark"),
    "torch.set_flush_denormal": (_flushes_denormals, torch.set_flush_denormal),
    "the hooks of saved tensors": (saved_tensors_hooks_refused, refuse_saved_tensors_hooks),
    "the filters of warnings": (lambda: [*warnings.filters], partial(setattr, warnings, "filters")),
    "the environment": (lambda: dict(os.environ), _set_environment),
    "Python's random numbers": (random.getstate, random.setstate),
    "NumPy's random numbers": (_numpy_state, lambda state: _numpy("random.set_state", state)),
    "NumPy's handling of errors": (lambda: _numpy("geterr"), lambda handling: _numpy("seterr", **handling)),
}


@contextmanager
def settings_kept() -> Iterator[None]:
    """Put back on leaving the context what an op must not change, so that a later row sees it change again."""
    before, generator = _settings(), torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(generator)
        for name in _changed(before):
            SETTINGS[name][1](before[name])


def _changed(before: dict[str, Any]) -> list[str]:
    """Return the names of the settings that are others than ``before``; NumPy's may not have been imported then."""
    now = _settings()
    return [name for name, value in before.items() if value is not _ABSENT and now[name] != value]


@capability("global state", of_dispatch=True)
def global_state(case: Case) -> str | None:
    """Forward and backward leave the process's default dtype, modes, threads, random numbers and environment alone."""
    draws = False
    for call in case.calls():
        before = _settings()
        after: dict[int, list[Tensor]] = {}
        with settings_kept():
            for seed in (1, 1, 2):
                torch.manual_seed(seed)
                start = torch.get_rng_state()
                _forward_backward(call)
                after.setdefault(seed, []).append(torch.get_rng_state())
                draws = draws or not torch.equal(start, after[seed][-1])
            changed = _changed(before)
        if changed:
            raise AssertionError(f"{describe(call)} changes {', '.join(changed)}")
        if torch.equal(after[1][0], after[2][0]):
            raise AssertionError(f"{describe(call)} seeds torch's random numbers anew")
        if not torch.equal(*after[1]):
            raise AssertionError(f"{describe(call)} leaves torch's random numbers otherwise than the seed says")
    return "draws random numbers" if draws else None


def _forward_backward(call: Call, seed: int = 1) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return fresh inputs, the outputs, and the gradients."""
    inputs = call.inputs
    outputs = call.with_tensors(inputs, call.input_keys).run()
    differentiable = [y for y in outputs if y.requires_grad]
    if not differentiable:
        return inputs, outputs, []
    return inputs, outputs, grads(differentiable, inputs, randn_like(differentiable, seed))


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
    """A call gets the results that it gets alone while other threads call: one whose whole call runs wherever this one
    returns from a built-in function, and several at once that meet as they happen to."""
    if case.interpreted:
        raise NotApplicable("Triton's interpreter has one thread")
    calls = case.calls(torch.float32)[: 1 if case.quick else None]
    for call in [grown(case, call) for call in calls]:
        run = [partial(_results, _spread(call, seed), seed) for seed in range(_THREADS)]
        alone = [each() for each in run]
        what = f"{describe(call)} while other threads call it"
        with ThreadPoolExecutor(2) as pool, _switching_often():
            interrupted = pool.submit(_interrupted, run[0], partial(pool.submit, run[1]))
            check_close(interrupted.result(), alone[0], what, rtol=1e-5)
        # A pool with finished tasks may take a busy thread for an idle one, and start too few to meet at a barrier.
        with ThreadPoolExecutor(_THREADS) as pool, _switching_often():
            barrier = threading.Barrier(_THREADS)
            for repeated, expected in zip([pool.submit(_repeat, each, barrier) for each in run], alone):
                for results in repeated.result():
                    check_close(results, expected, what, rtol=1e-5)
    return f"{_THREADS} threads"


_THREADS, _ROUNDS = 4, 2
_PATIENCE = 0.2  # seconds


def _spread(call: Call, seed: int) -> Call:
    """Return the call with other values of its inputs."""
    noise = randn_like(call.inputs, seed=seed)
    tensors = [(x.detach() * (1 + 0.05 * n)).requires_grad_() for x, n in zip(call.inputs, noise)]
    return call.with_tensors(tensors, call.input_keys)


def _results(call: Call, seed: int) -> list[Tensor]:
    _, outputs, gradients = _forward_backward(call, seed)
    return [t.detach() for t in (*outputs, *gradients)]


@contextmanager
def _switching_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def _interrupted(run: Callable[[], list[Tensor]], start: Callable[[], Future[list[Tensor]]]) -> list[Tensor]:
    """Return the results of ``run``, in which each built-in function is followed by all of what ``start`` starts."""
    others: list[Future[list[Tensor]]] = []

    def interrupt(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_return" and all(other.done() for other in others[-1:]):
            others.append(start())
            wait(others[-1:], timeout=_PATIENCE)  # for it may need a lock that this call holds

    sys.setprofile(interrupt)  # it is this thread's own
    try:
        results = run()
    finally:
        sys.setprofile(None)
    for other in others:
        other.result()  # it raises what the other call raised
    return results


def _repeat(run: Callable[[], list[Tensor]], barrier: threading.Barrier) -> list[list[Tensor]]:
    barrier.wait()
    return [run() for _ in range(_ROUNDS)]
