"""The other interfaces of an op: its modules, the ``apply`` idiom, its error messages."""

from __future__ import annotations

import copy
import io
import pickle
import re

import torch

from custom_ops.verify._case import Call, Case, NotApplicable, capability, check_close, check_same_bits, describe, grads


@capability("modules", of_dispatch=True, of_function=True)
def modules(case: Case) -> None:
    """Each module equals the function, survives save, deepcopy, pickle and state_dict, and has a repr of its own."""
    entries = case.info.modules()
    if not entries:
        raise NotApplicable("no module")
    arguments = Call(case.info.function, case.samples()[0]).tensors
    for module, kwargs in entries:
        module = module.to(case.device)
        expected = case.info.function(*arguments, **kwargs)
        check_close(module(*arguments), expected, f"{module!r} against the function with {kwargs}")
        if not repr(module).startswith(type(module).__name__):
            raise AssertionError(f"repr: expected it to begin with {type(module).__name__}, got {module!r}")
        saved = io.BytesIO()
        torch.save(module, saved)
        saved.seek(0)
        copies = {
            "torch.save": torch.load(saved, weights_only=False),
            "deepcopy": copy.deepcopy(module),
            "pickle": pickle.loads(pickle.dumps(module)),
        }
        copies["deepcopy"].load_state_dict(module.state_dict())
        for name, twin in copies.items():
            check_close(twin(*arguments), expected, f"{module!r} after {name}")
            if repr(twin) != repr(module):
                raise AssertionError(f"{name}: {module!r} came back as {twin!r}")


@capability("apply", of_dispatch=True)
def apply(case: Case) -> str | None:
    """``X.apply(...)`` equals the function: eager, forward and backward, compiled with fullgraph, under torch.func."""
    if case.info.apply is None:
        raise NotApplicable("no Function.apply given")
    calls = [c for c in case.calls() if not c.sample.kwargs]
    if not calls:
        raise NotApplicable("every sample has keyword arguments, which apply doesn't take")
    for call in calls:
        twin = Call(case.info.apply, call.sample)
        inputs, twin_inputs = call.inputs, twin.inputs
        check_same_bits(twin.run(), call.run(), f"apply on {describe(call)}")
        if not inputs:
            continue
        weights = call.weights()
        expected = grads(call(*inputs), inputs, weights)
        actual = grads(twin(*twin_inputs), twin_inputs, weights)
        check_same_bits(actual, expected, f"gradients of apply on {describe(call)}")
        if call.is_empty:
            continue
        plain = tuple(x.detach() for x in inputs)
        gradient = torch.func.vjp(twin, *plain)[1](tuple(weights))
        check_same_bits(gradient, expected, f"func.vjp of apply on {describe(call)}")
    for call in case.compiled_calls():
        if call.sample.kwargs or not call.input_keys:
            continue
        torch.compiler.reset()
        twin = Call(case.info.apply, call.sample, call.differentiable)
        inputs = twin.inputs
        outputs = torch.compile(lambda *xs, twin=twin: twin(*xs), backend=case.backend, fullgraph=True)(*inputs)
        check_close(outputs, call(*call.inputs), f"compiled apply on {describe(call)}")
        weights = call.weights()
        expected = grads(call(*inputs), inputs, weights)
        check_close(grads(outputs, inputs, weights), expected, f"gradients of compiled apply on {describe(call)}")
    return None


@capability("error messages")
def error_messages(case: Case) -> str:
    """Every listed wrong call raises one of the expected errors, with a message that names the argument."""
    bad_calls = case.info.bad_calls()
    if not bad_calls:
        raise NotApplicable("no wrong call listed")
    for bad in bad_calls:
        try:
            case.info.function(*bad.args, **bad.kwargs)
        except bad.error as error:
            if not re.search(bad.message, str(error)):
                raise AssertionError(f"expected a message matching {bad.message!r}, got {error!r}") from error
        else:
            raise AssertionError(f"raised nothing, expected a message matching {bad.message!r}")
    return f"{len(bad_calls)} wrong calls"
