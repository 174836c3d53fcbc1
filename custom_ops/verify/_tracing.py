"""The op as the compiler sees it: schema, fake kernel, compile, export."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from custom_ops.library._torch import (
    DynamicOutputShapeException,
    FakeTensorMode,
    OpOverload,
    TorchDispatchMode,
    aot_inductor_package,
    is_composed,
    no_recompiles,
    opname,
    schema,
)
from custom_ops.verify._case import (
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
    randn_like,
    short,
    squares,
)
from custom_ops.verify._fuzz import VALUES
from custom_ops.verify._values import LAYOUTS, grown, resized

# These are the tests of torch's opcheck; the first two run a kernel, and the rest are the same on every backend.
OPCHECKS = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
OF_KERNELS = OPCHECKS[:2]


@dataclass
class Record:
    """One call of a registered op, recorded below autograd."""

    op: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def tensors(self) -> list[Tensor]:
        return flatten([self.args, self.kwargs])

    def map(self, change: Callable[[Tensor], Tensor]) -> Record:
        def walk(tree: Any) -> Any:
            if isinstance(tree, (tuple, list)):
                return type(tree)(walk(t) for t in tree)
            return change(tree) if isinstance(tree, Tensor) else tree

        return Record(self.op, walk(self.args), {k: walk(v) for k, v in self.kwargs.items()}, self.outputs)

    def run(self) -> Any:
        return self.op(*self.args, **self.kwargs)

    def signature(self) -> tuple[Any, ...]:
        def one(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.dtype, value.shape, value.stride(), value.requires_grad
            if isinstance(value, (tuple, list)):
                return tuple(map(one, value))
            return repr(value)

        return self.op, *map(one, self.args), *(one(v) for v in self.kwargs.values())

    def __str__(self) -> str:
        shown = [f"{short(t.dtype)}{list(t.shape)} strides {list(t.stride())}" for t in self.tensors]
        return f"{self.op}({', '.join(shown)})"


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.records: dict[tuple[Any, ...], Record] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if func.namespace not in TORCH_NAMESPACES:
            record = Record(func, args, kwargs or {}, [y.detach() for y in flatten(outputs)])
            record = record.map(lambda t: t.detach().requires_grad_(t.requires_grad))
            self.records.setdefault(record.signature(), record)
        return outputs


def records(case: Case, dtypes: Sequence[torch.dtype], layouts: Sequence[str] = ()) -> list[Record]:
    """Return every distinct call of a registered op by forward, both backwards, jvp and vmap of the samples."""
    found: dict[tuple[Any, ...], Record] = {}
    for dtype in dtypes:
        for layout in ("", *layouts):
            found |= case.keep(("records", dtype, layout), partial(_recorded, case, dtype, layout))
    if not found:
        raise NotApplicable("reaches no registered op")
    return list(found.values())


def _recorded(case: Case, dtype: torch.dtype, layout: str) -> dict[tuple[Any, ...], Record]:
    recorder = _Recorder()
    for call in case.calls(dtype):
        by_size = layout.startswith("of size")
        if by_size:
            if not call.sample.dynamic or call.is_empty:
                continue
            call = _of_size(call, int(layout[-1]))
        elif layout:
            moved = [LAYOUTS[layout](t.detach()).requires_grad_(t.requires_grad) for t in call.tensors]
            call = call.with_tensors(moved)
        with recorder, suppress(Exception) if by_size else nullcontext():
            _exercise(call)
    return recorder.records


def _of_size(call: Call, size: int) -> Call:
    """Return the call with one or no element of each dynamic dimension, which not every op accepts."""
    dynamic = call.sample.dynamic
    tensors = [
        t.detach().narrow(dynamic[k], 0, size).clone().requires_grad_(t.requires_grad) if k in dynamic else t
        for k, t in zip(call.keys, call.tensors)
    ]
    return call.with_tensors(tensors)


def _exercise(call: Call) -> None:
    call.run()
    # Errors in these calls are reported by other rows.
    with suppress(Exception):
        everything(call)
    inputs = tuple(t.detach() for t in call.inputs)
    if not inputs:
        return
    with suppress(Exception):
        torch.func.jvp(call, inputs, tuple(randn_like(inputs, seed=4)))
    with suppress(Exception):
        torch.vmap(torch.func.grad(call.loss))(*(torch.stack([x, x]) for x in inputs))


@capability("opcheck", of_dispatch=True)
def opcheck(case: Case) -> str:
    """``torch.library.opcheck`` passes for every registered op that forward or backward calls."""
    check = partial(torch.library.opcheck, test_utils=OF_KERNELS if case.sparing else OPCHECKS)
    seen: dict[OpOverload, list[Record]] = {}
    for record in records(case, [torch.float64]):
        seen.setdefault(record.op, []).append(record)
    for op, calls in seen.items():
        for record in _varied(calls)[: 1 if case.quick else 8]:
            if _refuses_a_gradient(record):
                record = record.map(lambda t: t.detach())
            try:
                check(op, record.args, record.kwargs)
            except Exception as error:
                if not isinstance(error.__cause__, NotImplementedError):
                    raise AssertionError(f"{record}: {error}") from error
                # An op of the highest existing order refuses to be differentiated; everything else of it is checked.
                detached = record.map(lambda t: t.detach())
                check(op, detached.args, detached.kwargs)
    return ", ".join(opname(op) for op in seen)


def _refuses_a_gradient(record: Record) -> bool:
    """Return whether the op raises ``NotImplementedError`` when such a call is differentiated."""
    outputs = [y for y in flatten(record.run()) if y.requires_grad]
    leaves = [t for t in record.tensors if t.requires_grad]
    try:
        if outputs:
            torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs], allow_unused=True)
    except NotImplementedError:
        return True
    return False


def _varied(calls: Sequence[Record]) -> list[Record]:
    """Return the most telling calls first: those that need a gradient, largest first."""
    return sorted(
        calls, key=lambda r: (any(t.requires_grad for t in r.tensors), sum(t.numel() for t in r.tensors)), reverse=True
    )


@capability("fake kernel")
def fake_kernel(case: Case) -> str | None:
    """Under ``FakeTensorMode`` every registered op gives its real shape, dtype, strides and device."""
    layouts = ["transposed"]
    if not case.sparing:
        layouts += ["inner transposed", "channels last", "of size 1", "of size 0"]
    found = records(case, [torch.float64], layouts)
    if torch.bfloat16 in case.info.dtypes and not case.sparing:
        found += records(case, [torch.bfloat16], [] if case.quick else layouts)
    detached = [record.map(lambda t: t.detach()) for record in found]
    for record in {record.signature(): record for record in detached}.values():
        _check_metadata(_faked(record), record.outputs, f"fake kernel of {record}")
    return None


@capability("meta device", of_dispatch=True)
def meta_device(case: Case) -> str | None:
    """On the meta device every registered op gives its real shape, dtype and strides."""
    dependent = set()
    done = 0
    for record in records(case, [torch.float64], ["transposed"]):
        record = record.map(lambda t: t.detach())
        try:
            outputs = record.map(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")).run()
        except (DynamicOutputShapeException, NotImplementedError, RuntimeError) as error:
            if not _data_dependent(record):
                raise error
            dependent.add(opname(record.op))
            continue
        done += 1
        _check_metadata(outputs, record.outputs, f"meta kernel of {record}", device=False)
    remark = f"{', '.join(sorted(dependent))}: the output's size depends on data" if dependent else None
    if not done:
        raise NotApplicable(remark or "reaches no registered op")
    return remark


def _data_dependent(record: Record) -> bool:
    """Return whether a size of the fake output depends on data."""
    return any(not isinstance(size, int) for y in flatten(_faked(record)) for size in y.shape)


def _faked(record: Record) -> Any:
    """Return the fake result; its sizes are integers, except where they depend on data."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fake = record.map(lambda t: mode.from_tensor(t, static_shapes=True))
    with mode:
        return fake.run()


def _check_metadata(fake: Any, real: Any, what: str, device: bool = True) -> None:
    fakes, reals = flatten(fake), flatten(real)
    if len(fakes) != len(reals):
        raise AssertionError(f"{what}: {len(fakes)} outputs, really {len(reals)}")
    for i, (f, r) in enumerate(zip(fakes, reals)):
        if f.dtype != r.dtype or f.dim() != r.dim():
            raise AssertionError(f"{what}: output {i} is {f.dtype}, {f.dim()}-d, really {r.dtype}, {r.dim()}-d")
        if device and f.device != r.device:
            raise AssertionError(f"{what}: output {i} is on {f.device}, really on {r.device}")
        # A data-dependent size is a symbol, which equals any size.
        if any(isinstance(a, int) and a != b for a, b in zip(f.shape, r.shape)):
            raise AssertionError(f"{what}: output {i} has shape {list(f.shape)}, really {list(r.shape)}")
        strides = zip(f.stride(), r.stride(), r.shape)
        if r.numel() and any(isinstance(a, int) and a != b and size > 1 for a, b, size in strides):
            raise AssertionError(f"{what}: output {i} has strides {list(f.stride())}, really {list(r.stride())}")


@capability("ops functional")
def ops_functional(case: Case) -> None:
    """No registered op returns memory of an argument or another output, or writes to one without saying so."""
    for record in records(case, [torch.float64]):
        if schema(record.op).is_mutable:  # it is called on copies, or else the row on the inputs fails
            continue
        record = record.map(lambda t: t.detach())
        copies = [t.clone() for t in record.tensors]
        with torch.no_grad():
            outputs = flatten(record.run())
        check_same_bits(record.tensors, copies, f"{record} mutated its arguments")
        taken = {t.untyped_storage().data_ptr() for t in record.tensors if t.numel()}
        for i, y in enumerate(outputs):
            if y.numel() and y.untyped_storage().data_ptr() in taken:
                raise AssertionError(f"{record}: output {i} aliases an argument or another output")
            taken.add(y.untyped_storage().data_ptr())


# --- compile -----------------------------------------------------------------------------------


def _compile(function: Callable[..., Any], backend: str, **flags: Any) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, backend=backend, fullgraph=True, **flags)


def _leaves(call: Call) -> list[Tensor]:
    return [t.detach().clone(memory_format=torch.preserve_format).requires_grad_(t.requires_grad) for t in call.tensors]


def _forward_backward(call: Call, function: Callable[..., Any]) -> list[Tensor]:
    """Return the outputs of ``function`` and their gradients."""
    tensors = _leaves(call)
    outputs = flatten(function(*tensors))
    inputs = [t for t in tensors if t.requires_grad]
    differentiable = [y for y in outputs if y.requires_grad]
    results = [y.detach() for y in outputs]
    if inputs:
        if not differentiable:
            raise AssertionError(f"{describe(call)}: no output requires grad")
        results += grads(differentiable, inputs, randn_like(differentiable, seed=1))
    return results


def _outputs(call: Call, only: Sequence[int] | None = None) -> Callable[..., tuple[Tensor, ...]]:
    """Return the outputs as a function of all tensors, without closing over one, on which Dynamo would guard."""
    function, keys = call.function, call.keys
    args = [None if isinstance(a, Tensor) else a for a in call.sample.args]
    kwargs = {k: v for k, v in call.sample.kwargs.items() if not isinstance(v, Tensor)}

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        positional, named = list(args), dict(kwargs)
        for key, tensor in zip(keys, tensors):
            if isinstance(key, int):
                positional[key] = tensor
            else:
                named[key] = tensor
        found = flatten(function(*positional, **named))
        return tuple(found if only is None else [found[i] for i in only])

    return outputs


@capability("compile", of_dispatch=True)
def compiled(case: Case) -> str:
    """``torch.compile(fullgraph=True)``, forward and backward, equals eager; it uses Inductor in quick mode too."""
    for call in case.compiled_calls(torch.float32):
        function = _outputs(call)
        actual = _forward_backward(call, _compile(function, "inductor", dynamic=False))
        check_close(actual, _forward_backward(call, function), f"compiled {describe(call)}", rtol=1e-5)
    return "inductor"


@capability("compiled composition", of_dispatch=True)
def compiled_composition(case: Case) -> None:
    """The composition that a compiler gets for an op equals eager: in every dtype, for NaN, infinities, large sizes."""
    if not _composed(case):
        raise NotApplicable("a compiler is given the registered ops as they are")
    kinds = ["as given", *(kind for kind in ("NaN", "infinite") if kind not in case.info.not_fuzzed)]
    for dtype in case.info.dtypes:
        tolerance = (4 if dtype.itemsize == 2 else 64) * torch.finfo(dtype).eps
        for call in case.compiled_calls(dtype):
            program = _compile(_outputs(call), "aot_eager", dynamic=False)
            for kind in kinds:
                moved = call if kind == "as given" else _special(call, kind)
                what = f"what is compiled for {describe(moved)} with values {kind}"
                actual, expected = _forward_backward(moved, program), _forward_backward(moved, _outputs(call))
                check_close(actual, expected, what, rtol=tolerance)
    for call in case.compiled_calls(torch.float32)[:1]:
        big = grown(case, call)
        big = big.with_tensors([LAYOUTS["transposed"](t.detach()).requires_grad_(t.requires_grad) for t in big.tensors])
        tolerance = max(64.0, max(t.numel() for t in big.tensors) ** 0.5) * torch.finfo(torch.float32).eps
        actual = _forward_backward(big, _compile(_outputs(big), "aot_eager", dynamic=False))
        expected = _forward_backward(big, _outputs(big))
        check_close(actual, expected, f"what is compiled for {describe(big)}, transposed", rtol=tolerance)


def _composed(case: Case) -> bool:
    return any(is_composed(record.op) for record in records(case, [torch.float64]))


def _special(call: Call, kind: str) -> Call:
    """Return the call with such values in its inputs."""
    generator = torch.Generator().manual_seed(7)
    new = [VALUES[kind](x.shape, x.dtype, generator).to(x).requires_grad_() for x in call.inputs]
    return call.with_tensors(new, call.input_keys)


@capability("compile dynamic", of_dispatch=True, of_function=True)
def compiled_dynamic(case: Case) -> str:
    """``torch.compile(fullgraph=True, dynamic=True)`` is right at three sizes, forward and backward, without
    recompiling.
    """
    for call in case.dynamic_calls():
        function = _outputs(call)
        dynamic = _compile(function, case.backend, dynamic=True)
        for times in (1, 2, 3):
            sized = resized(call, times)
            with no_recompiles(times > 1):
                actual = _forward_backward(sized, dynamic)
            check_close(actual, _forward_backward(sized, function), f"compiled {describe(sized)}")
    return case.backend


def _transformed(case: Case, transform: Callable[[Call], tuple[Callable[..., Any], Sequence[Tensor]]]) -> str:
    for call in case.differentiable_calls()[: 1 if case.quick else 3]:
        function, arguments = transform(call)
        actual = _compile(function, case.backend)(*arguments)
        check_close(actual, function(*arguments), f"compiled, {describe(call)}")
    return case.backend


def _grad(call: Call) -> Callable[..., Any]:
    """Return the gradient of a scalar as a function of all tensors."""
    function = _outputs(call, call.differentiable)
    argnums = tuple(i for i, t in enumerate(call.tensors) if t.requires_grad)
    return torch.func.grad(lambda *tensors: squares(function(*tensors)), argnums)


@capability("compile(grad)", of_dispatch=True)
def compiled_grad(case: Case) -> str:
    """``torch.compile(torch.func.grad(f))`` equals eager."""
    return _transformed(case, lambda call: (_grad(call), [t.detach() for t in call.tensors]))


@capability("compile(vmap(grad))", of_dispatch=True)
def compiled_vmap_grad(case: Case) -> str:
    """``torch.compile(torch.vmap(torch.func.grad(f)))``, over the differentiable inputs, equals eager."""

    def transform(call: Call) -> Any:
        in_dims = tuple(0 if t.requires_grad else None for t in call.tensors)
        tensors = [torch.stack([t.detach(), 2 * t.detach()]) if t.requires_grad else t for t in call.tensors]
        return torch.vmap(_grad(call), in_dims), tensors

    return _transformed(case, transform)


@capability("compile(jvp)", of_dispatch=True)
def compiled_jvp(case: Case) -> str:
    """``torch.compile`` of a function that calls ``torch.func.jvp`` equals eager."""

    def transform(call: Call) -> Any:
        function = _outputs(call, call.differentiable)
        tensors = [t.detach() for t in call.tensors]
        moving = [i for i, t in enumerate(call.tensors) if t.requires_grad]
        count = len(tensors)

        def tangent(*arguments: Tensor) -> Any:
            def of_inputs(*inputs: Tensor) -> tuple[Tensor, ...]:
                every = list(arguments[:count])
                for i, x in zip(moving, inputs):
                    every[i] = x
                return function(*every)

            return torch.func.jvp(of_inputs, tuple(arguments[i] for i in moving), tuple(arguments[count:]))[1]

        return tangent, [*tensors, *randn_like(call.inputs, seed=4)]

    return _transformed(case, transform)


# --- export ------------------------------------------------------------------------------------


class _Program(torch.nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.outputs = _outputs(call)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.outputs(*tensors)


def _exported(call: Call) -> torch.export.ExportedProgram:
    # A size that is specialised nevertheless is found when the program runs on other sizes.
    auto = torch.export.Dim.AUTO
    shapes = tuple({call.sample.dynamic[k]: auto} if k in call.sample.dynamic else {} for k in call.keys)
    tensors = tuple(t.detach() for t in call.tensors)
    return torch.export.export(_Program(call), tensors, dynamic_shapes=(shapes,))


@capability("export", of_dispatch=True)
def export(case: Case) -> None:
    """``torch.export`` keeps the dynamic dimensions dynamic, and the program is right on other sizes."""
    for call in case.dynamic_calls():
        program = _exported(call).module()
        for times in (1, 2, 3):
            sized = resized(call, times)
            tensors = [t.detach() for t in sized.tensors]
            check_close(program(*tensors), sized.run(), f"exported, {describe(sized)}")


@capability("AOTInductor", full_only=True, of_dispatch=True)
def aot_inductor(case: Case) -> None:
    """The exported op, compiled to a package and loaded, is right on another size."""
    for call in case.dynamic_calls(torch.float32):
        with tempfile.TemporaryDirectory() as folder:
            package = str(Path(folder) / "model.pt2")
            model = aot_inductor_package(_exported(call), package)
            for times in (1, 3):
                sized = resized(call, times)
                tensors = [t.detach() for t in sized.tensors]
                check_close(model(*tensors), sized.run(), f"package on {describe(sized)}", rtol=1e-5)
