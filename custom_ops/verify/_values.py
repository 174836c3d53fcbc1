"""Values, dtypes, layouts and memory: all rows but those of derivatives and tracing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from custom_ops.library._torch import TorchDispatchMode, version
from custom_ops.verify._case import (
    TOLERANCE,
    TORCH_NAMESPACES,
    Call,
    Case,
    NotApplicable,
    capability,
    check_close,
    check_same_bits,
    describe,
    everything,
    flatten,
    grads,
    leaf,
    randn_like,
    short,
)


@capability("value", every_sample=True)
def value(case: Case) -> None:
    """In float64 every output equals the reference's: shape, dtype, values, and whether it has a gradient."""
    for call in case.calls():
        reference = case.reference(call)
        actual, expected = call.run(), reference.run()
        check_close(actual, expected, f"value of {describe(call)}")
        for i, (a, e) in enumerate(zip(actual, expected)):
            if call.input_keys and a.requires_grad != e.requires_grad:
                flags = f"requires_grad={a.requires_grad}, the reference's is {e.requires_grad}"
                raise AssertionError(f"output {i} of {describe(call)}: {flags}")


@capability("gradient", every_sample=True)
def gradient(case: Case) -> None:
    """In float64 the gradient of each input equals the reference's, for each output alone and all together."""
    for call in case.calls():
        if call.input_keys:
            reference = Call(case.reference(call).function, call.sample, call.differentiable)
            for weights in _cotangents(call.weights()):
                expected = _gradients(reference, weights)
                check_close(_gradients(call, weights), expected, f"gradients of {describe(call)}")
    case.differentiable_calls()


def _cotangents(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    yield list(weights)
    if len(weights) > 1:
        for i in range(len(weights)):
            yield [w if i == j else torch.zeros_like(w) for j, w in enumerate(weights)]


def _gradients(call: Call, weights: Sequence[Tensor]) -> list[Tensor]:
    inputs = call.inputs
    return grads(call(*inputs), inputs, weights)


def _check_dtype(case: Case, dtype: torch.dtype) -> None:
    if dtype not in case.info.dtypes:
        raise NotApplicable("not among the op's dtypes")
    for call in case.calls(dtype):
        _check_rounded(case, call, dtype)


def _check_rounded(case: Case, call: Call, dtype: torch.dtype) -> None:
    """Compare with the float64 reference on the same (rounded) values.

    16-bit results may be off by two roundings of their own size, which requires wider accumulation; float32 results may
    be off by a few dozen roundings of the largest, or by as many as a random walk of one step for each element takes.
    Autograd may also sum the gradient over broadcast dimensions in its own dtype.
    """
    roundings = max(64.0, max((t.numel() for t in call.tensors), default=0) ** 0.5)
    eps, wide = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    half = dtype.itemsize == 2
    call64 = call.with_tensors([double(t) for t in call.tensors])
    oracle = case.reference(call64) if case.info.reference is not None else call64
    inputs, oracle_inputs = call.inputs, oracle.inputs
    actual, expected = (c.with_tensors(i, c.input_keys).run() for c, i in ((call, inputs), (oracle, oracle_inputs)))
    rounding = max(roundings * eps, TOLERANCE)
    rtol, atol = (2 * eps, roundings * wide) if half else (rounding, rounding)
    check_close(actual, expected, f"{short(dtype)} value of {describe(call)}", rtol, atol, dtypes=False)
    with suppress(NotApplicable, NotImplementedError):
        for i, (a, e) in enumerate(zip(actual, flatten(case.reference(call).run()))):
            if a.dtype != e.dtype:
                raise AssertionError(f"output {i} of {describe(call)}: {short(a.dtype)}, expected {short(e.dtype)}")
    if not inputs:
        return
    pairs = [(a, e) for a, e in zip(actual, expected) if a.requires_grad]
    if not pairs:
        raise AssertionError("inputs require grad, but no output does: the derivative is cut off")
    weights = randn_like([a for a, _ in pairs], seed=1)
    expected = grads([e for _, e in pairs], oracle_inputs, [double(w) for w in weights])
    actual = grads([a for a, _ in pairs], inputs, weights)
    atol = 2 * eps if half else atol
    check_close(actual, expected, f"{short(dtype)} gradients of {describe(call)}", rtol, atol, dtypes=False)


def double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor


@capability("float32", every_sample=True)
def float32(case: Case) -> None:
    """Values and gradients in float32 equal those of the float64 reference on the same values."""
    _check_dtype(case, torch.float32)


@capability("bfloat16", every_sample=True)
def bfloat16(case: Case) -> None:
    """Values and gradients in bfloat16 are accumulated in float32 and rounded once."""
    _check_dtype(case, torch.bfloat16)


@capability("float16", every_sample=True)
def float16(case: Case) -> None:
    """Values and gradients in float16 are accumulated in float32 and rounded once."""
    _check_dtype(case, torch.float16)


@capability("autocast", of_dispatch=True)
def autocast(case: Case) -> str:
    """Under autocast float32 inputs get float32 gradients, and results near those without it, of the promised dtype."""
    dtypes = set()
    for call in case.differentiable_calls(torch.float32):
        expected = call(*call.inputs)
        weights = call.weights()
        for low in (torch.bfloat16, torch.float16):
            if low not in case.info.dtypes:
                continue
            inputs = call.inputs
            with torch.autocast(case.device.type, dtype=low):
                outputs = call(*inputs)
            tolerance = 8 * torch.finfo(low).eps
            what = f"{describe(call)} under autocast to {short(low)}"
            if case.info.autocast is not None:
                _check_promise(case, call, low, case.info.autocast if case.info.autocast.itemsize > 2 else low)
            dtypes |= {short(y.dtype) for y in outputs}
            check_close(outputs, expected, f"value of {what}", tolerance, tolerance, dtypes=False)
            actual = grads(outputs, inputs, [w.to(y.dtype) for w, y in zip(weights, outputs)])
            check_close(actual, _gradients(call, weights), f"gradients of {what}", tolerance, tolerance)
    return f"gives {', '.join(sorted(dtypes))}"


def _check_promise(case: Case, call: Call, low: torch.dtype, promised: torch.dtype) -> None:
    """Check that the outputs have the promised dtype for float32 and for 16-bit inputs."""
    for dtype in (torch.float32, low):
        inputs = [x.detach().to(dtype).requires_grad_() for x in call.inputs]
        with torch.autocast(case.device.type, dtype=low):
            found = {short(y.dtype) for y in call(*inputs)}
        if found != {short(promised)}:
            raise AssertionError(
                f"{describe(call)} with {short(dtype)} inputs under autocast to {short(low)}: {', '.join(found)}, "
                f"promised {short(promised)}"
            )


# --- layouts -----------------------------------------------------------------------------------

Layout = Callable[[Tensor], Tensor]


def _junk(tensor: Tensor) -> Tensor:
    """Return values for the gaps between the elements of a strided view, which would show if they were read."""
    if tensor.is_floating_point():
        return torch.full_like(tensor, float("nan"))
    return torch.full_like(tensor, 1 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


LAYOUTS: dict[str, Layout] = {
    "strided": lambda t: torch.stack([t, _junk(t)], -1)[..., 0],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t,
    "sliced from cat": lambda t: torch.cat([_junk(t), t], -1).narrow(-1, t.shape[-1], t.shape[-1]) if t.dim() else t,
    "storage offset": lambda t: torch.cat([_junk(t).reshape(-1), t.reshape(-1)])[t.numel() :].view(t.shape),
    "inner transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 2 else t,
    "outer transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 2 else t,
    "last dimension first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1) if t.dim() > 2 else t,
    "first dimension last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0) if t.dim() > 2 else t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
}
# These layouts change the values, so the result is compared with that of a contiguous copy.
EXPANDED: dict[str, Layout] = {
    "expanded": lambda t: t.reshape(-1)[:1].view((1,) * t.dim()).expand(t.shape) if t.numel() else t,
    "expanded in the first dimension": lambda t: t[:1].expand(t.shape) if t.dim() and t.numel() else t,
    "expanded in the last dimension": lambda t: t[..., :1].expand(t.shape) if t.dim() and t.numel() else t,
}


def _layouts(case: Case) -> dict[str, Layout]:
    """Return the layouts to test; when sparing, only those that a wrong launcher can't handle by luck."""
    layouts = LAYOUTS | EXPANDED
    return {name: layouts[name] for name in ("strided", "transposed", "expanded")} if case.sparing else layouts


def _laid_out(tensor: Tensor, layout: Layout) -> Tensor:
    return layout(tensor.detach()).requires_grad_(tensor.requires_grad)


def _row_major(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def _same_layout(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(s.stride() == t.stride() and s.storage_offset() == t.storage_offset() for s, t in zip(a, b))


def run_leaves(call: Call, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return outputs and gradients with exactly these tensors (a clone would change their strides)."""
    outputs = call.with_tensors(tensors).run()
    inputs = [t for t in tensors if t.requires_grad]
    if not inputs:
        return outputs
    differentiable = [y for y in outputs if y.requires_grad]
    return [y.detach() for y in outputs] + grads(differentiable, inputs, randn_like(differentiable, seed=1))


def _subsets(case: Case, name: str, count: int) -> Iterator[set[int]]:
    """Yield which tensors get the layout: all together, then one by one (in quick mode for one layout only)."""
    yield set(range(count))
    if count > 1 and (name == "strided" or not case.quick):
        yield from ({i} for i in range(count))


@capability("input layouts")
def input_layouts(case: Case) -> None:
    """Results don't depend on layouts: strided, transposed, sliced from cat, offset, channels-last, expanded inputs."""
    for call in case.calls():
        tensors = [_laid_out(t, _row_major) for t in call.tensors]
        contiguous = run_leaves(call, tensors)
        for name, layout in _layouts(case).items():
            for chosen in _subsets(case, name, len(tensors)):
                moved = [_laid_out(t, layout) if i in chosen else t for i, t in enumerate(tensors)]
                if _same_layout(moved, tensors):
                    continue
                expected = contiguous
                if name in EXPANDED:
                    try:
                        expected = run_leaves(call, [_laid_out(t, _row_major) for t in moved])
                    except Exception:  # the op doesn't accept the expanded values
                        continue
                what = f"{describe(call)} with {name} tensors {sorted(chosen)}"
                check_close(run_leaves(call, moved), expected, what)


@capability("gradient layouts")
def gradient_layouts(case: Case) -> None:
    """Results don't depend on the layouts of incoming gradients and tangents, up to second order."""
    for call in case.differentiable_calls():
        inputs, weights = call.inputs, call.weights()
        outputs = call(*inputs)
        tangents = () if "func.jvp" in case.info.not_applicable else randn_like(inputs, seed=4)
        derivatives = partial(_derivatives, call, inputs, outputs, weights, tangents)
        contiguous = derivatives(_row_major)
        for name, layout in _layouts(case).items():
            expected = contiguous
            if name in EXPANDED:
                expected = derivatives(_contiguous_after(layout))
            elif _same_layout([layout(t) for t in (*weights, *tangents)], [*weights, *tangents]):
                continue
            check_close(
                derivatives(layout), expected, f"derivatives of {describe(call)} with {name} gradients and tangents"
            )


def _contiguous_after(layout: Layout) -> Layout:
    return lambda t: layout(t).contiguous()


def _derivatives(
    call: Call,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    tangents: Sequence[Tensor],
    layout: Layout,
) -> list[Tensor]:
    """Return first and second derivatives and tangents, for gradients and tangents of that layout."""
    weights = [layout(w.detach()).requires_grad_() for w in weights]
    results = grads(outputs, inputs, weights, create_graph=True)
    connected = [g for g in results if g.requires_grad]
    with suppress(RuntimeError):  # another row reports a missing second derivative
        directions = [layout(d) for d in randn_like(connected, seed=3)]
        second = grads(connected, [*inputs, *weights], directions, retain_graph=True) if connected else []
        results = results + second
    if tangents:
        plain = tuple(x.detach() for x in inputs)
        results = results + list(torch.func.jvp(call, plain, tuple(layout(t) for t in tangents))[1])
    return results


@capability("zero size", every_sample=True)
def zero_size(case: Case) -> str | None:
    """With size 0 along the dynamic dimensions, values equal the reference's and the gradient is connected."""
    refused = 0
    for call in case.dynamic_calls():
        empty = resized(call, 0)
        try:
            expected = everything(case.reference(empty))
        except NotApplicable:
            expected = None
        except Exception:
            refused += 1
            continue
        try:
            actual = everything(empty)
        except Exception as error:
            if expected is not None:
                raise
            raise NotApplicable(f"refuses size 0, and no reference says whether it may: {error}") from None
        if expected is not None:
            check_close(actual[: len(expected)], expected, f"{describe(empty)}")
    if refused:
        return f"the reference refuses {refused} of the samples"
    return None


def resized(call: Call, times: int) -> Call:
    """Return the call with dynamic dimensions ``times`` as long; each element is repeated, so sorted tensors stay
    sorted.
    """
    tensors = [
        leaf(t.detach().repeat_interleave(times, call.sample.dynamic[key]).requires_grad_(t.requires_grad))
        if key in call.sample.dynamic
        else t
        for key, t in zip(call.keys, call.tensors)
    ]
    return call.with_tensors(tensors)


def dynamic_dimensions(call: Call) -> dict[int | str, int]:
    """Return dimensions that can be longer together: one of each tensor that has the size, or else of one tensor."""
    dims = [(key, dim, size) for key, t in zip(call.keys, call.tensors) for dim, size in enumerate(t.shape) if size > 1]
    together = [
        {key: dim for key, dim, size in reversed(dims) if size == wanted}  # the first of each tensor
        for wanted in dict.fromkeys(size for _, _, size in dims)
    ]
    for choice in [*together, *({key: dim} for key, dim, _ in dims)]:
        varied = replace(call, sample=replace(call.sample, dynamic=choice))
        try:
            for times in (2, 3):
                resized(varied, times).run()
        except Exception:  # the op needs that size
            continue
        return choice
    return {}


# --- memory ------------------------------------------------------------------------------------


@capability("inputs unmutated")
def inputs_unmutated(case: Case) -> None:
    """Forward and backward leave inputs and incoming gradients as they were, bit by bit, large ones too."""
    for call in _both_sizes(case):
        tensors = [leaf(t) for t in call.tensors]
        _unchanged(call.with_tensors(tensors).run, tensors, f"forward of {describe(call)}")
        inputs = call.inputs
        if not inputs:
            continue
        weights = call.weights()
        outputs = call(*inputs)
        backward = partial(grads, outputs, inputs, weights)
        _unchanged(backward, [*inputs, *weights], f"backward of {describe(call)}")


def _both_sizes(case: Case) -> Iterator[Call]:
    for i, call in enumerate(case.calls()):
        yield call
        big = grown(case, call) if i == 0 or not case.sparing else call
        if big is not call:
            yield big


def _unchanged(run: Callable[[], object], tensors: Sequence[Tensor], what: str) -> None:
    copies, versions = [t.detach().clone() for t in tensors], [version(t) for t in tensors]
    run()
    check_same_bits(tensors, copies, f"{what} mutated its arguments")
    if [version(t) for t in tensors] != versions:
        raise AssertionError(f"{what} wrote to its arguments in place")


@capability("outputs own memory")
def outputs_own_memory(case: Case) -> None:
    """No output shares memory with an input, and no gradient with an incoming one."""
    for call in case.calls():
        tensors = [leaf(t) for t in call.tensors]
        _disjoint(call.with_tensors(tensors).run(), tensors, f"output of {describe(call)}")
        inputs = call.inputs
        if inputs:
            weights = call.weights()
            outputs = call(*inputs)
            _disjoint(grads(outputs, inputs, weights), [*inputs, *weights], f"gradient of {describe(call)}")


def _disjoint(outputs: Sequence[Tensor], inputs: Sequence[Tensor], what: str) -> None:
    taken = {t.untyped_storage().data_ptr() for t in inputs if t.numel()}
    for i, y in enumerate(outputs):
        if y.numel() and y.untyped_storage().data_ptr() in taken:
            raise AssertionError(f"{what}: tensor {i} aliases an argument")


@capability("deterministic")
def deterministic(case: Case) -> str:
    """Outputs, gradients and second derivatives are bitwise the same in a second run; the first two on other threads
    too.
    """
    threads = torch.get_num_threads()
    sizes = []
    for call in case.calls(torch.float32):
        big = grown(case, call)
        sizes.append(max((t.numel() for t in big.tensors), default=0))
        results = []
        try:
            for count in (2, 2) if case.interpreted else (2, 2, 1):  # Triton's interpreter has one thread
                torch.set_num_threads(count)
                results.append(everything(big))
        finally:
            torch.set_num_threads(threads)
        check_same_bits(results[0], results[1], f"two runs of {describe(big)}")
        if not case.interpreted:
            # Second derivatives are left out, as they may contain torch's own sums, which depend on the threads.
            first = len(big.run()) + len(big.inputs)
            what = f"one thread and two on {describe(big)}"
            if _only_of_torch(big):  # torch's products of matrices depend on the number of threads
                check_close(results[1][:first], results[2][:first], what, rtol=1e-4)
            else:
                check_same_bits(results[1][:first], results[2][:first], what)
    return f"up to {max(sizes)} elements"


class _Foreign(TorchDispatchMode):
    """Records whether an op runs that isn't torch's own."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or func.namespace not in TORCH_NAMESPACES
        return func(*args, **(kwargs or {}))


def _only_of_torch(call: Call) -> bool:
    with _Foreign() as mode:
        call.run()
    return not mode.seen


def grown(case: Case, call: Call) -> Call:
    """Return the call with longer dynamic dimensions, for which threads matter, and distinct values in its inputs."""
    like = describe(call.with_tensors([t.detach().bool() for t in call.tensors]))  # one growth serves all dtypes
    times = case.keep(("growth", like), partial(_growth, case, call))
    if times == 1:
        return call
    big = resized(call, times)
    noise = randn_like(big.inputs, seed=5)
    spread = [x.detach().mul(1 + 0.1 * n).requires_grad_() for x, n in zip(big.inputs, noise)]
    return big.with_tensors(spread, big.input_keys)


def _growth(case: Case, call: Call, elements: int = 1 << 18) -> int:
    """Return how often to repeat the dynamic dimensions: until threads matter, or the call or its reference takes
    long.
    """
    times, limit = 1, 0.02 if case.quick else 0.1
    if not case.interpreted:
        everything(call)  # the first run takes longer
    can_grow = any(call.tensors[call.keys.index(key)].numel() for key in call.sample.dynamic)  # an empty one can't
    while can_grow:
        big = resized(call, times)
        if _seconds(partial(everything, big)) > limit or max(t.numel() for t in call.tensors) * times > elements:
            break
        if case.info.reference is not None:
            reference = partial(run_leaves, case.reference(big), big.tensors)
            if _seconds(reference) > (0.25 if case.quick else 1):
                break
        times *= 4
    return times


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()  # CPU time, so that a busy machine finds the same growth
    run()
    return time.process_time() - start


@capability("large")
def large(case: Case) -> str:
    """Values and gradients equal the reference's at sizes for which kernels use blocks and threads."""
    sizes = []
    for dtype in [d for d in (torch.float64, torch.float32) if d in case.info.dtypes]:
        for call in case.dynamic_calls(dtype):
            big = grown(case, call)
            sizes.append(max(t.numel() for t in big.tensors))
            _check_rounded(case, big, dtype)
    return f"up to {max(sizes)} elements"


@capability("no uninitialised memory")
def no_uninitialised_memory(case: Case) -> None:
    """Results stay the same if fresh memory is filled with NaN (for integers, with the largest number)."""
    for dtype in (torch.float64, torch.float32):
        for call in case.calls(dtype):
            expected = everything(call)
            with _poisoned_memory():
                actual = everything(call)
            check_close(actual, expected, f"{describe(call)} in poisoned memory", rtol=0.0)


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    settings: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = True
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fill
