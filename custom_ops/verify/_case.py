"""The input of every capability: an op's sample calls, its reference, and comparisons."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from custom_ops.registry import OpInfo, Sample

Key = int | str
# An assertion that fails in these folders is a comparison of the battery; in any other place it is the op's own.
COMPARISONS = (str(Path(__file__).parent), str(Path(torch.testing.__file__).parent))
TORCH_NAMESPACES = {"aten", "prim", "prims", "quantized", "c10d", "_c10d_functional", "inductor", "profiler"}


class NotApplicable(Exception):
    """An error of a check that has nothing to test on this op; its message is the reason.

    `verify` turns it into a cell of the matrix. Code that calls parts of the battery itself has to expect it:
    `random_sample` raises it if the op has no sample of the dtype that was drawn.

    Example:
        >>> import torch
        >>> from custom_ops.verify import NotApplicable, OpInfo, random_sample
        >>> never = OpInfo("never", torch.sin, torch.sin, lambda device, dtype: [], "An op without samples")
        >>> try:
        ...     random_sample(never, lambda choices: choices[0])
        ... except NotApplicable as reason:
        ...     print(reason)
        no sample of dtype float64
    """


class NotChecked(NotApplicable):
    """Raised by a check that these samples don't reach, though the op may have what it checks."""


@dataclass(frozen=True)
class Capability:
    """A row of the matrix. If ``may_be_refused``, an op that declares the row not applicable must raise in its check.

    Rows about the kernels' numbers (``every_sample``) take all samples; the others take two if the case is `sparing`.
    Rows ``of_dispatch`` are about how torch calls an op's Python parts, which are the same on every backend and for all
    variants of the op. Those of them that are ``of_function`` are about the public function's own Python, in which
    variants differ.
    """

    name: str
    meaning: str
    check: Callable[[Case], str | None]
    full_only: bool = False
    may_be_refused: bool = False
    every_sample: bool = False
    of_dispatch: bool = False
    of_function: bool = False

    @property
    def of_variants(self) -> bool:
        return self.of_function or not self.of_dispatch


CAPABILITIES: dict[str, Capability] = {}


def capability(name: str, **flags: bool) -> Callable[[Callable[[Case], str | None]], Callable[[Case], str | None]]:
    """Add the decorated check to the matrix; its docstring is the meaning of the row.

    The check passes if it returns, possibly with a remark to print. If it raises `NotApplicable`, the row doesn't
    apply; any other exception is the failure.
    """

    def decorate(check: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
        CAPABILITIES[name] = Capability(name, " ".join((check.__doc__ or "").split()), check, **flags)
        return check

    return decorate


@dataclass
class Call:
    """A sample as a function of its tensors; ``inputs`` are the tensors that require a gradient."""

    function: Callable[..., Any]
    sample: Sample
    _outputs: tuple[int, ...] | None = field(default=None, repr=False)
    _like: list[Tensor] | None = field(default=None, repr=False)  # the differentiable outputs

    @property
    def keys(self) -> list[Key]:
        return [key for key, _ in _tensors(self.sample)]

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for _, tensor in _tensors(self.sample)]

    @property
    def input_keys(self) -> list[Key]:
        return [key for key, tensor in _tensors(self.sample) if tensor.requires_grad]

    @property
    def inputs(self) -> list[Tensor]:
        """Return fresh leaves, so checks don't share a graph or a ``.grad``."""
        return [leaf(tensor) for tensor in self.tensors if tensor.requires_grad]

    def with_tensors(self, tensors: Sequence[Tensor], keys: Sequence[Key] | None = None) -> Call:
        new = dict(zip(self.keys if keys is None else keys, tensors))
        args = tuple(new.get(i, a) for i, a in enumerate(self.sample.args))
        kwargs = {k: new.get(k, a) for k, a in self.sample.kwargs.items()}
        return replace(self, sample=replace(self.sample, args=args, kwargs=kwargs), _like=None)

    def run(self) -> list[Tensor]:
        """Return all output tensors."""
        return flatten(self.function(*self.sample.args, **self.sample.kwargs))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the differentiable outputs as a function of the differentiable inputs."""
        return self.chosen(self.with_tensors(inputs, self.input_keys).run())

    def chosen(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(outputs[i] for i in self.differentiable)

    @property
    def differentiable(self) -> tuple[int, ...]:
        """Return the indices of the outputs that depend on the inputs, according to their ``requires_grad``."""
        return tuple(self.find_differentiable()) if self._outputs is None else self._outputs

    def find_differentiable(self) -> dict[int, Tensor]:
        """Run the call and return its differentiable outputs by index; inside of a transform they can't be found."""
        outputs = self.with_tensors(self.inputs, self.input_keys).run()
        found = {i: y.detach() for i, y in enumerate(outputs) if y.requires_grad}
        if not found:
            raise AssertionError("inputs require grad, but no output does: the derivative is cut off")
        self.differentiable_like(found)
        return found

    def differentiable_like(self, found: dict[int, Tensor]) -> None:
        self._outputs, self._like = tuple(found), list(found.values())

    def weights(self) -> list[Tensor]:
        """Return a fixed random cotangent for each differentiable output."""
        return randn_like(self.find_differentiable().values() if self._like is None else self._like, seed=1)

    def loss(self, *inputs: Tensor) -> Tensor:
        """Return a scalar that isn't linear in the outputs, so every op has a second derivative."""
        return squares(self(*inputs))

    @property
    def is_empty(self) -> bool:
        return any(t.numel() == 0 for t in self.tensors)


@dataclass
class Case:
    """An op on one device, with the samples and results that several capabilities share."""

    info: OpInfo
    device: torch.device
    quick: bool
    interpreted: bool = False
    every_sample: bool = True  # set for the row being checked
    kept: dict[Any, Any] = field(default_factory=dict)

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return the cached result of ``make`` for this key, which any row may have computed; an error isn't cached."""
        key = (self.info.name, *key, self.every_sample)
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    @property
    def sparing(self) -> bool:
        """Return whether rows do less work: in quick mode under Triton's interpreter, whose calls are slow."""
        return self.quick and self.interpreted

    def samples(self, dtype: torch.dtype = torch.float64) -> list[Sample]:
        with torch.random.fork_rng(devices=[]):
            # Seeding a GPU's generator too would record a stack trace, which takes longer than the samples.
            (torch.default_generator if self.device.type == "cpu" else torch).manual_seed(0)
            samples = self.info.samples(self.device, dtype)
        if not samples:
            raise NotApplicable(f"no sample of dtype {short(dtype)}")
        refuse_wrong(samples)
        return samples[:2] if self.sparing and not self.every_sample else samples

    def calls(self, dtype: torch.dtype = torch.float64) -> list[Call]:
        return [Call(self.info.function, sample) for sample in self.samples(dtype)]

    def differentiable_calls(self, dtype: torch.dtype = torch.float64) -> list[Call]:
        """Return the non-empty calls that have an input which requires a gradient."""
        calls = [c for c in self.calls(dtype) if c.input_keys and not c.is_empty]
        for i, call in enumerate(calls):
            call.differentiable_like(self.keep(("outputs", dtype, i), call.find_differentiable))
        if not calls and self.info.differentiable:
            raise NotChecked("no sample has an input that requires grad; differentiable=False says that none can")
        if not calls:
            raise NotApplicable("not differentiable")
        return calls

    def low_dimensional_calls(self) -> Iterator[tuple[str, Call, Call]]:
        """Yield description, call and oracle, for rows whose work is quadratic in the inputs.

        Under Triton's interpreter in quick mode, the inputs move along two random directions each instead of element by
        element.
        """
        for call in self.differentiable_calls():
            oracle = self.oracle(call)
            if self.sparing:
                yield describe(call), along(call), along(oracle)
            else:
                yield describe(call), call, oracle

    def compiled_calls(self, dtype: torch.dtype = torch.float64) -> list[Call]:
        """Return the first calls (in quick mode, the first) to compile, as compilation takes long."""
        calls = [c for c in self.calls(dtype) if not c.is_empty]
        return calls[: 1 if self.quick else 3]

    def dynamic_calls(self, dtype: torch.dtype = torch.float64) -> list[Call]:
        calls = [c for c in self.calls(dtype) if c.sample.dynamic]
        if not calls:
            raise NotChecked("no sample names a dynamic dimension, and none was found by trying")
        return calls[: 1 if self.quick else 3]

    def reference(self, call: Call) -> Call:
        if self.info.reference is None:
            raise NotApplicable("no reference given")
        return Call(self.info.reference, call.sample)

    def oracle(self, call: Call) -> Call:
        """Return the call that derivatives are compared with: the reference, else the function's own backward."""
        function = self.info.function if self.info.reference is None else self.info.reference
        return Call(function, call.sample, call.differentiable)

    @property
    def backend(self) -> str:
        return "aot_eager" if self.quick else "inductor"


def refuse_wrong(samples: Sequence[Sample]) -> None:
    """Raise if an argument nests tensors, or if a dynamic dimension isn't one of a tensor."""
    for i, sample in enumerate(samples):
        tensors = dict(_tensors(sample))
        for key, value in [*enumerate(sample.args), *sample.kwargs.items()]:
            if not isinstance(value, Tensor) and flatten(value):
                raise ValueError(
                    f"sample_inputs: argument {key!r} of sample {i} is a {type(value).__name__} with tensors in it, "
                    "expected each tensor as an argument of its own: give a function that takes them so"
                )
        for key, dim in sample.dynamic.items():
            if key not in tensors or not -tensors[key].dim() <= dim < tensors[key].dim():
                shapes = {k: list(t.shape) for k, t in tensors.items()}
                raise ValueError(
                    f"sample_inputs: sample {i} has dynamic={sample.dynamic}, expected dimensions of its tensors, "
                    f"whose shapes are {shapes}"
                )


def _tensors(sample: Sample) -> Iterator[tuple[Key, Tensor]]:
    named: list[tuple[Key, Any]] = [*enumerate(sample.args), *sample.kwargs.items()]
    for key, value in named:
        if isinstance(value, Tensor):
            yield key, value


def flatten(tree: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [t for branch in tree for t in flatten(branch)] if isinstance(tree, (tuple, list)) else []


def leaf(tensor: Tensor) -> Tensor:
    """Return a leaf with the same values and strides in fresh memory."""
    return tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_(tensor.requires_grad)


def randn_like(tensors: Iterable[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device, t.dtype) for t in tensors]


def grads(outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor], **flags: Any) -> list[Tensor]:
    """Return the vector-Jacobian product, with zeros for inputs that the outputs don't depend on."""
    found = torch.autograd.grad(list(outputs), list(inputs), list(weights), allow_unused=True, **flags)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs)]


def explain(error: Exception) -> str:
    """Return an error as the detail of a failed cell."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    hint = "\ngive the op a batching rule by library.vmap" if "hit the vmap fallback" in str(error) else ""
    if isinstance(error, AssertionError) and where.filename.startswith(COMPARISONS):
        return str(error)
    return f"{type(error).__name__}: {error}{hint}\n(at {where.name}, line {where.lineno} of {where.filename})"


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def along(call: Call, directions: int = 2) -> Call:
    """Return the call as a function of each input's displacement along random directions."""
    inputs = [x.detach() for x in call.inputs]
    moves = [torch.stack(many) for many in zip(*(randn_like(inputs, seed=6 + i) for i in range(directions)))]

    def function(*steps: Tensor) -> tuple[Tensor, ...]:
        return call(*(x + torch.tensordot(s, m, 1) for x, s, m in zip(inputs, steps, moves)))

    steps = [x.new_zeros(directions).requires_grad_() for x in inputs]
    return Call(function, Sample(tuple(steps)), tuple(range(len(call.differentiable))))


def jacobian(call: Call) -> Tensor:
    """Return the Jacobian of all outputs, with one backward for each output element."""
    inputs = call.inputs
    y = flat(call(*inputs))
    rows = [flat(grads([y], inputs, [e], retain_graph=True)) for e in torch.eye(y.numel()).to(y)]
    return torch.stack(rows)


def hessian(call: Call) -> Tensor:
    """Return the Hessian of `Call.loss`, by reverse over reverse mode."""
    inputs = call.inputs
    one = torch.ones((), dtype=inputs[0].dtype, device=inputs[0].device)
    gradient = flat(grads([call.loss(*inputs)], inputs, [one], create_graph=True))
    if not gradient.requires_grad:
        return torch.zeros(gradient.numel(), gradient.numel()).to(gradient)
    return torch.stack(
        [flat(grads([gradient], inputs, [e], retain_graph=True)) for e in torch.eye(gradient.numel()).to(gradient)]
    )


def matrix(blocks: Any, columns: Sequence[Tensor]) -> Tensor:
    """Join torch.func's nested tuples of Jacobian blocks."""
    joined = (torch.cat([b.reshape(-1, c.numel()) for b, c in zip(row, columns)], 1) for row in blocks)
    return torch.cat(list(joined))


def squares(outputs: Sequence[Tensor]) -> Tensor:
    """Return a sum of squares, weighted so that elements differ, and so do outputs, such as a sine and a cosine.

    It can be traced and draws no random numbers.
    """
    weighted = [y * y * torch.arange(i, y.numel() + i).to(y).view(y.shape) for i, y in enumerate(outputs, 1)]
    return torch.stack([y.sum() for y in weighted]).sum()


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(call: Call) -> str:
    def one(value: Any) -> str:
        return f"{short(value.dtype)}{list(value.shape)}" if isinstance(value, Tensor) else repr(value)

    parts = [one(a) for a in call.sample.args] + [f"{k}={one(v)}" for k, v in call.sample.kwargs.items()]
    return f"({', '.join(parts)})"


# Orders of summation differ by rounding errors, of at most a few dozen ulp; a larger difference is an error.
TOLERANCE = 1e-10


def check_close(
    actual: Any, expected: Any, what: str, rtol: float = TOLERANCE, atol: float | None = None, dtypes: bool = True
) -> None:
    """Check that structure, shapes, dtypes and values agree; ``atol`` is relative to the largest value."""
    actual, expected = flatten(actual), flatten(expected)
    if len(actual) != len(expected):
        raise AssertionError(f"{what}: {len(actual)} tensors, expected {len(expected)}")
    for i, (a, e) in enumerate(zip(actual, expected)):
        name = what if len(actual) == 1 else f"{what} [{i}]"
        if a.shape != e.shape:
            raise AssertionError(f"{name}: shape {list(a.shape)}, expected {list(e.shape)}")
        if dtypes and a.dtype != e.dtype:
            raise AssertionError(f"{name}: {short(a.dtype)}, expected {short(e.dtype)}")
        if a.is_floating_point():
            a, e = a.detach().double(), e.detach().double()
        finite = e[e.isfinite()].abs() if e.is_floating_point() else e.new_empty(0)
        scale = finite.max().item() if finite.numel() else 0.0
        absolute = (rtol if atol is None else atol) * scale + 1e-300
        torch.testing.assert_close(a, e, rtol=rtol, atol=absolute, equal_nan=True, msg=partial("{}: {}".format, name))


def check_same_bits(actual: Any, expected: Any, what: str) -> None:
    for i, (a, e) in enumerate(zip(flatten(actual), flatten(expected), strict=True)):
        a, e = a.detach(), e.detach()
        same = a.shape == e.shape and a.dtype == e.dtype and bool(((a == e) | ((a != a) & (e != e))).all())
        if not same:
            raise AssertionError(f"{what}: tensor {i} differs")


def everything(call: Call) -> list[Tensor]:
    """Return outputs, gradients and gradients of the gradients, as far as the op has them."""
    inputs = call.inputs
    outputs = call.with_tensors(inputs, call.input_keys).run()
    results = list(outputs)
    if not inputs:
        return results
    outputs = [outputs[i] for i in call.differentiable]
    weights = [w.requires_grad_() for w in randn_like(outputs, seed=1)]
    first = grads(outputs, inputs, weights, create_graph=True)
    results += first
    connected = [g for g in first if g.requires_grad]
    if connected:
        results += grads(connected, [*inputs, *weights], randn_like(connected, seed=3))
    return [t.detach() for t in results]
