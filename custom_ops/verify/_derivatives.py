"""Derivatives by every route of PyTorch, compared with the reference's."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from custom_ops.library._torch import no_vmap_fallback
from custom_ops.verify._case import (
    Call,
    Case,
    NotApplicable,
    capability,
    check_close,
    describe,
    flat,
    grads,
    hessian,
    jacobian,
    leaf,
    matrix,
    randn_like,
)


@capability("gradcheck", of_dispatch=True)
def gradcheck(case: Case) -> None:
    """Gradients equal finite differences in float64: in reverse mode, in forward mode, and in both batched."""
    for call in case.differentiable_calls():
        with no_vmap_fallback():
            torch.autograd.gradcheck(
                call,
                call.inputs,
                check_forward_ad="forward AD" not in case.info.not_applicable,
                check_undefined_grad=not case.sparing,
                check_batched_grad=True,
                check_batched_forward_grad="forward AD" not in case.info.not_applicable,
                fast_mode=case.quick,
            )


@capability("gradgradcheck", may_be_refused=True, of_dispatch=True)
def gradgradcheck(case: Case) -> None:
    """Second derivatives of the op's square (and, in the full matrix, of the op) equal finite differences."""
    forward_over_reverse = "forward AD" not in case.info.not_applicable
    for _, call, _ in case.low_dimensional_calls():
        for function in (call.loss,) if case.quick else (call, call.loss):
            torch.autograd.gradgradcheck(
                function,
                call.inputs,
                check_undefined_grad=not case.sparing,
                check_fwd_over_rev=forward_over_reverse,
                check_batched_grad=True,
                fast_mode=case.quick,
            )


@capability("second derivative", may_be_refused=True, every_sample=True)
def second_derivative(case: Case) -> None:
    """Derivatives of the gradient, in inputs and incoming gradient, equal the reference's; none is silently zero."""
    for call in case.differentiable_calls():
        case.reference(call)
        check_close(_second(call), _second(case.oracle(call)), f"second derivatives of {describe(call)}")


def _second(call: Call) -> list[Tensor]:
    inputs = call.inputs
    outputs = call(*inputs)
    weights = [w.requires_grad_() for w in randn_like(outputs, seed=1)]
    first = grads(outputs, inputs, weights, create_graph=True)
    # The square depends on the incoming gradient even if the gradient doesn't depend on the inputs.
    total = sum((g * g * v).sum() for g, v in zip(first, randn_like(first, seed=3)))
    assert isinstance(total, Tensor)
    if not total.requires_grad:
        return [torch.zeros_like(t) for t in (*inputs, *weights)]
    return grads([total], [*inputs, *weights], [torch.ones_like(total)])


@capability("forward AD")
def forward_mode(case: Case) -> None:
    """With dual tensors, tangents of each input alone and of all together equal the reference's Jacobian-vector
    product.
    """
    for call in case.differentiable_calls():
        expected = jacobian(case.oracle(call))
        inputs = [x.detach() for x in call.inputs]
        directions = randn_like(inputs, seed=4)
        for chosen in [range(len(inputs)), *([i] for i in range(len(inputs)))]:
            moving = [d if i in chosen else torch.zeros_like(d) for i, d in enumerate(directions)]
            with forward_ad.dual_level():
                duals = [
                    forward_ad.make_dual(x, d) if i in chosen else x for i, (x, d) in enumerate(zip(inputs, directions))
                ]
                parts = [forward_ad.unpack_dual(y) for y in call(*duals)]
                tangents = [torch.zeros_like(p.primal) if p.tangent is None else p.tangent for p in parts]
            check_close(flat(tangents), expected @ flat(moving), f"tangent of {describe(call)} in {list(chosen)}")


@capability("batched grad", of_dispatch=True)
def batched_grad(case: Case) -> None:
    """``autograd.grad(is_grads_batched=True)`` equals a loop over the rows."""
    for call in case.differentiable_calls():
        inputs = call.inputs
        outputs = call(*inputs)
        batches = [torch.stack(rows) for rows in zip(*(randn_like(outputs, seed=s) for s in range(3)))]
        with no_vmap_fallback():
            actual = grads(outputs, inputs, batches, is_grads_batched=True, retain_graph=True)
        for i in range(3):
            expected = grads(outputs, inputs, [b[i] for b in batches], retain_graph=True)
            check_close([g[i] for g in actual], expected, f"batched gradients of {describe(call)}")


def _detached(call: Call) -> tuple[Tensor, ...]:
    return tuple(x.detach() for x in call.inputs)


def _all(call: Call) -> tuple[int, ...]:
    return tuple(range(len(call.inputs)))


def _weighted(call: Call) -> Callable[..., Tensor]:
    weights = call.weights()
    return lambda *inputs: sum((y * w).sum() for y, w in zip(call(*inputs), weights))  # type: ignore[return-value]


@capability("each input alone", of_dispatch=True)
def each_input_alone(case: Case) -> None:
    """The gradient of each input, and of each pair, stays the same if only those inputs require one."""
    calls = [c for c in case.differentiable_calls() if len(c.input_keys) > 1]
    if not calls:
        raise NotApplicable("no sample has several inputs that require grad")
    for call in calls:
        weights, indices = call.weights(), range(len(call.inputs))
        inputs = call.inputs
        expected = grads(call(*inputs), inputs, weights)
        subsets = [*combinations(indices, 1), *combinations(indices, 2)]
        for chosen in [subset for subset in subsets if len(subset) < len(indices)][: 6 if case.quick else None]:
            inputs = [x if i in chosen else x.detach() for i, x in enumerate(call.inputs)]
            wanted = [inputs[i] for i in chosen]
            pairs = [(y, w) for y, w in zip(call(*inputs), weights) if y.requires_grad]
            actual = (
                grads([y for y, _ in pairs], wanted, [w for _, w in pairs])
                if pairs
                else list(map(torch.zeros_like, wanted))
            )
            what = f"gradients of {describe(call)} in {list(chosen)} alone"
            check_close(actual, [expected[i] for i in chosen], what)


@capability("checkpoint", of_dispatch=True)
def checkpointed(case: Case) -> None:
    """Gradients are right under ``checkpoint``, reentrant and not, and with saved tensors moved or copied by hooks."""
    for call in case.differentiable_calls():
        weights = call.weights()
        expected = _gradients_of_two_layers(case.oracle(call), weights)
        for reentrant in (True, False):
            through = partial(checkpoint, use_reentrant=reentrant)
            what = f"gradients of {describe(call)}, checkpoint(use_reentrant={reentrant})"
            check_close(_gradients_of_two_layers(call, weights, through), expected, what)
        hooks = {
            "save_on_cpu": torch.autograd.graph.save_on_cpu(),
            "copied": torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t),
        }
        for name, hook in hooks.items():
            with hook:
                actual = _gradients_of_two_layers(call, weights)
            check_close(actual, expected, f"gradients of {describe(call)}, saved tensors {name}")


def _gradients_of_two_layers(
    call: Call, weights: Sequence[Tensor], through: Callable[..., Any] = lambda layer, *inputs: layer(*inputs)
) -> list[Tensor]:
    """Return gradients of the op applied twice, on different values and between other functions."""

    def layer(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(y.sin() for y in call(*inputs))

    inputs = call.inputs
    outputs = [through(layer, *(x * factor for x in inputs)) for factor in (1, 1.125)]
    torch.autograd.backward([y for ys in outputs for y in ys], [*weights, *weights])
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]


@capability("version check", of_dispatch=True)
def version_check(case: Case) -> None:
    """Writing to an argument or output before the backward raises there or leaves the gradients right."""
    for call in case.differentiable_calls():
        weights = call.weights()
        oracle = case.oracle(call)
        inputs = oracle.inputs
        expected = grads(oracle(*inputs), inputs, weights)
        for i in range(len(call.tensors) + len(weights)):
            tensors = [leaf(t) for t in call.tensors]
            outputs = call.chosen(call.with_tensors(tensors).run())
            written = [*tensors, *outputs][i]
            with torch.no_grad():
                written.mul_(-3) if written.is_floating_point() else written.zero_()
            try:
                actual = grads(outputs, [t for t in tensors if t.requires_grad], weights)
            except RuntimeError as error:
                if not re.search("modified (by an )?inplace", str(error)):
                    raise
                continue
            what = f"argument {call.keys[i]}" if i < len(tensors) else f"output {i - len(tensors)}"
            check_close(actual, expected, f"gradients of {describe(call)} after writing to {what}")


@capability("func.grad", of_dispatch=True)
def func_grad(case: Case) -> None:
    """``torch.func.grad`` of a weighted sum of the outputs equals the reference's gradient."""
    for call in case.differentiable_calls():
        actual = torch.func.grad(_weighted(call), _all(call))(*_detached(call))
        oracle = case.oracle(call)
        inputs = oracle.inputs
        check_close(actual, grads(oracle(*inputs), inputs, call.weights()), f"func.grad of {describe(call)}")


@capability("func.vjp", of_dispatch=True)
def func_vjp(case: Case) -> None:
    """``torch.func.vjp``, applied to a random cotangent, equals the reference's gradient."""
    for call in case.differentiable_calls():
        outputs, pull_back = torch.func.vjp(call, *_detached(call))[:2]
        weights = randn_like(outputs, seed=1)
        oracle = case.oracle(call)
        inputs = oracle.inputs
        expected = grads(oracle(*inputs), inputs, weights)
        check_close(pull_back(tuple(weights)), expected, f"func.vjp of {describe(call)}")


@capability("func.jvp", of_dispatch=True)
def func_jvp(case: Case) -> None:
    """``torch.func.jvp`` along a random direction equals the reference's tangent, also under ``no_grad``."""
    for call in case.differentiable_calls():
        inputs = _detached(call)
        direction = randn_like(inputs, seed=4)
        expected = jacobian(case.oracle(call)) @ flat(direction)
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                actual = torch.func.jvp(call, inputs, tuple(direction))[1]
            check_close(flat(actual), expected, f"func.jvp of {describe(call)}")


@capability("func.jacrev", of_dispatch=True)
def func_jacrev(case: Case) -> None:
    """``torch.func.jacrev``, a vmap over reverse mode, equals the reference's Jacobian without vmap's fallback."""
    _check_jacobian(case, torch.func.jacrev)


@capability("func.jacfwd", of_dispatch=True)
def func_jacfwd(case: Case) -> None:
    """``torch.func.jacfwd``, a vmap over forward mode, equals the reference's Jacobian without vmap's fallback."""
    _check_jacobian(case, torch.func.jacfwd)


def _check_jacobian(case: Case, transform: Callable[..., Any]) -> None:
    for what, call, oracle in case.low_dimensional_calls():
        inputs = _detached(call)
        with no_vmap_fallback():
            blocks = transform(call, _all(call))(*inputs)
        actual = matrix(blocks, inputs)
        check_close(actual, jacobian(oracle), f"{transform.__name__} of {what}")


@capability("func.hessian", may_be_refused=True, of_dispatch=True)
def func_hessian(case: Case) -> None:
    """``torch.func.hessian`` (forward over reverse) and reverse over reverse equal the reference's Hessian."""
    for what, call, oracle in case.low_dimensional_calls():
        inputs = _detached(call)
        expected = hessian(oracle)
        transforms = {
            "hessian": torch.func.hessian(call.loss, _all(call)),
            "jacrev(jacrev)": torch.func.jacrev(torch.func.jacrev(call.loss, _all(call)), _all(call)),
        }
        for name, transform in transforms.items():
            with no_vmap_fallback():
                blocks = transform(*inputs)
            check_close(matrix(blocks, inputs), expected, f"{name} of {what}")


@capability("forward over forward", may_be_refused=True, of_dispatch=True)
def forward_over_forward(case: Case) -> None:
    """``jacfwd`` of ``jacfwd`` and ``jvp`` of ``jvp`` equal the reference's Hessian."""
    for what, call, oracle in case.low_dimensional_calls():
        inputs = _detached(call)
        expected = hessian(oracle)
        nested = torch.func.jacfwd(torch.func.jacfwd(call.loss, _all(call)), _all(call))
        with no_vmap_fallback():
            blocks = nested(*inputs)
        check_close(matrix(blocks, inputs), expected, f"jacfwd(jacfwd) of {what}")
        first, second = (tuple(randn_like(inputs, seed=seed)) for seed in (4, 5))
        along = partial(_tangent, call.loss, first)
        actual = _tangent(along, second, *inputs)
        check_close(actual, flat(first) @ expected @ flat(second), f"jvp(jvp) of {what}")


def _tangent(function: Callable[..., Any], direction: tuple[Tensor, ...], *inputs: Tensor) -> Any:
    return torch.func.jvp(function, inputs, direction)[1]


# --- vmap --------------------------------------------------------------------------------------


@capability("vmap")
def vmap(case: Case) -> str | None:
    """Without its fallback, vmap equals a Python loop: over each tensor and all, in any dimension, nested, of one."""
    remarks = set()
    checked = False
    for call in case.calls():
        if call.is_empty or not call.keys:
            continue
        for keys in _choices(call)[: 2 if case.sparing else None]:
            try:
                batch, expected = _batch(call, keys, size=2 if case.sparing else 3)
            except NotApplicable as reason:
                remarks.add(f"not over argument {', '.join(map(str, keys))}: {reason}")
                continue
            try:
                _check_vmap(call, keys, batch, expected, _in_dims(batch)[-1 if case.sparing else 0 :])
                checked = True
            except AssertionError:
                raise
            except Exception as error:
                if keys[0] in call.input_keys and len(keys) == 1:
                    raise
                if not _refused_by_reference(case, call, keys, batch):
                    raise
                remarks.add(f"not over argument {', '.join(map(str, keys))}: {str(error).splitlines()[0]}")
    if not checked:
        raise NotApplicable("; ".join(sorted(remarks)) or "no sample to batch")
    return "; ".join(sorted(remarks)) or None


def _choices(call: Call) -> list[list[Any]]:
    """Return the choices of tensors to batch: all, those that require a gradient, and each one alone."""
    choices = [call.keys, call.input_keys, *([key] for key in call.keys)]
    return [c for i, c in enumerate(choices) if c and c not in choices[:i]]


def _batch(call: Call, keys: Sequence[Any], size: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """Return examples made of the sample's own values, which are in the op's domain, and their outputs."""
    tensors = dict(zip(call.keys, call.tensors))
    shuffled, repeated = (
        [torch.stack([change(tensors[k].detach(), i) for i in range(size)]) for k in keys]
        for change in (_shuffled, _repeated)
    )
    try:
        return shuffled, _loop(call, keys, shuffled)
    except Exception:  # the op refuses these values, such as indices that are no longer sorted
        return repeated, _loop(call, keys, repeated)


def _shuffled(tensor: Tensor, i: int) -> Tensor:
    values = tensor.reshape(-1)
    return (values.roll(i) if i % 2 else values.flip(0).roll(-i) if i else values).view(tensor.shape)


def _repeated(tensor: Tensor, i: int) -> Tensor:
    return tensor * (1 + i / 8) if tensor.is_floating_point() else tensor


def _loop(call: Call, keys: Sequence[Any], batch: Sequence[Tensor]) -> list[Tensor]:
    examples = [call.with_tensors([b[i] for b in batch], keys).run() for i in range(len(batch[0]))]
    try:
        return [torch.stack(outputs) for outputs in zip(*examples, strict=True)]
    except RuntimeError:
        raise NotApplicable("the examples' outputs differ in size") from None


def _check_vmap(
    call: Call,
    keys: Sequence[Any],
    batch: Sequence[Tensor],
    expected: Sequence[Tensor],
    in_dims: Sequence[tuple[int, ...]],
) -> None:
    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(call.with_tensors(tensors, keys).run())

    what = f"{describe(call)} over arguments {list(keys)}"
    with no_vmap_fallback():
        for dims in in_dims:
            actual = torch.vmap(function, in_dims=dims)(*(b.movedim(0, d) for b, d in zip(batch, dims)))
            check_close(actual, expected, f"vmap(in_dims={dims}) of {what}")
        one = torch.vmap(function)(*(b[:1] for b in batch))
        check_close(one, [e[:1] for e in expected], f"vmap of a batch of one of {what}")
        if call.input_keys and set(call.input_keys) <= set(
            keys
        ):  # torch's own out_dims fails for an output that isn't batched
            chosen = [expected[i] for i in call.differentiable]
            last = tuple(e.dim() - 1 for e in chosen)
            actual = torch.vmap(lambda *ts: call.chosen(function(*ts)), out_dims=last)(*batch)
            check_close([y.movedim(-1, 0) for y in actual], chosen, f"vmap(out_dims={last}) of {what}")
        twice = [torch.stack([b, b.flip(0)]).movedim(1, -1) for b in batch]
        nested = torch.vmap(torch.vmap(function, in_dims=-1))(*twice)
        check_close(nested, [torch.stack([e, e.flip(0)]) for e in expected], f"vmap(vmap) of {what}")


def _in_dims(batch: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Return the first, the last and a middle dimension for all tensors, and then a different one for each."""
    places = [range(b.dim()) for b in batch]
    chosen = [tuple(dims) for dims in ([0] * len(batch), [-1] * len(batch), [len(p) // 2 for p in places])]
    chosen.append(tuple((i + 1) % len(p) for i, p in enumerate(places)))
    return list(dict.fromkeys(chosen))


def _refused_by_reference(case: Case, call: Call, keys: Sequence[Any], batch: Sequence[Tensor]) -> bool:
    """Return whether plain PyTorch can't be vmapped over these arguments either."""
    if case.info.reference is None:
        return not set(keys) & set(call.input_keys) or len(keys) > 1
    reference = case.reference(call)
    try:
        torch.vmap(lambda *tensors: tuple(reference.with_tensors(tensors, keys).run()))(*batch)
    except Exception:
        return True
    return False


@capability("vmap(grad)")
def vmap_of_grad(case: Case) -> None:
    """Per-example gradients, ``vmap(grad(f))``, equal a Python loop over the reference."""
    for call in case.differentiable_calls():
        batch, _ = _batch(call, call.input_keys)
        with no_vmap_fallback():
            actual = torch.vmap(torch.func.grad(call.loss, _all(call)))(*batch)
        oracle = case.oracle(call)
        for i in range(len(batch[0])):
            inputs = [b[i].clone().requires_grad_() for b in batch]
            expected = torch.autograd.grad(oracle.loss(*inputs), inputs, allow_unused=True, materialize_grads=True)
            check_close([g[i] for g in actual], expected, f"vmap(grad) of {describe(call)}")
