"""The compositions of ops in PyTorch's own: equal to the kernels, and run by ONNX Runtime where it is installed."""

from __future__ import annotations

import importlib.util
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import custom_ops
from custom_ops import library
from custom_ops.registry import FUNCTIONS, leaves

MADE_OF = library.decompositions()
SIZED = (torch.ops.custom_ops.voxel_unique.default, torch.ops.custom_ops.voxel_slots.default)
_SAMPLES = [
    pytest.param(info, sample, id=f"{info.name} {i}")
    for info in FUNCTIONS.values()
    for i, sample in enumerate(info.samples(torch.device("cpu"), torch.float32))
    if info.family == "voxel"
]


class Compared(TorchDispatchMode):
    """Compare the composition of every op that is called with its kernel."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in MADE_OF:
            if func in SIZED and (args[-1] is False or args[-1] == -1):
                with pytest.raises(NotImplementedError, match="max_voxels: expected a number"):
                    MADE_OF[func](*args)
                return result
            composed = MADE_OF[func](*args)
            self.seen.add(func)
            torch.testing.assert_close(composed, result, equal_nan=True, msg=lambda text: f"{func}: {text}")
        return result


def test_compositions_equal_the_kernels():
    with Compared() as compared:
        rank = torch.tensor([2, 0, -1, 2])
        custom_ops.voxel_sum(torch.ones(4, 1), rank, 3, csr=custom_ops.voxel_csr(rank, 3))
        for info in (info for info in FUNCTIONS.values() if info.family != "ranking"):
            for dtype in (torch.float64, torch.float32):
                for sample in info.samples(torch.device("cpu"), dtype):
                    outputs = info.function(*sample.args, **sample.kwargs)
                    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                    inputs = leaves([*sample.args, *sample.kwargs.values()])
                    if inputs:
                        loss = sum(o.square().sum() for o in outputs if o.requires_grad)
                        grads = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
                        if info.family == "voxel" and any(g is not None and g.requires_grad for g in grads):
                            sum(g.square().sum() for g in grads if g is not None).backward()
    of_voxels = {op for op in MADE_OF if MADE_OF[op].__module__ == "custom_ops.voxel.decompositions"}
    assert of_voxels <= compared.seen


@pytest.mark.parametrize("shape", [(0, 1, 2, 1, 2), (1, 0, 2, 1, 2), (1, 1, 0, 1, 2), (1, 1, 2, 0, 2)])
def test_compositions_of_cameras_without_points(shape):
    depth = torch.rand(shape, requires_grad=True)
    feat = torch.rand(*shape[:2], 3, *shape[3:], requires_grad=True)
    with Compared():
        custom_ops.bev_pool(depth, feat, torch.zeros(shape, dtype=torch.int64), 4).sum().backward()


class Called(torch.nn.Module):
    """A call of an op whose tensors are the inputs."""

    def __init__(self, info, sample):
        super().__init__()
        self.info, self.sample = info, sample
        self.at = [i for i, a in enumerate(sample.args) if isinstance(a, torch.Tensor)]
        self.names = [name for name, a in sample.kwargs.items() if isinstance(a, torch.Tensor)]

    def inputs(self):
        given = [self.sample.args[i] for i in self.at] + [self.sample.kwargs[name] for name in self.names]
        return tuple(t.detach() for t in given)

    def forward(self, *tensors):
        args, kwargs = list(self.sample.args), dict(self.sample.kwargs)
        for i, tensor in zip(self.at, tensors):
            args[i] = tensor
        kwargs.update(zip(self.names, tensors[len(self.at) :]))
        result = self.info.function(*args, **kwargs)
        return tuple(result) if isinstance(result, tuple) else result


@pytest.mark.full
@pytest.mark.parametrize(("info", "sample"), _SAMPLES)
def test_onnx_runtime_gives_equal_numbers(info, sample):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} isn't installed")
    import onnxruntime

    module = Called(info, sample)
    inputs = module.inputs()
    if any(0 in t.shape for t in inputs):
        pytest.skip("ONNX Runtime's topk and scatter don't take tensors without elements")
    program = torch.export.export(module, inputs)
    sized = [node.args[-1] for node in program.graph.nodes if node.target in SIZED]
    if any(size is False or size == -1 for size in sized):
        with pytest.raises(NotImplementedError, match="max_voxels: expected a number"):
            program.run_decompositions(library.decompositions())
        return
    file = io.BytesIO()
    torch.onnx.export(program.run_decompositions(library.decompositions()), (), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    results = session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)})
    expected = module(*inputs)
    for got, want in zip(results, expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want, equal_nan=True)


def test_a_program_of_compositions_needs_no_kernel():
    class Pool(torch.nn.Module):
        def forward(self, x, rank):
            return custom_ops.relu(custom_ops.voxel_softmax(x, rank, 4))

    inputs = torch.randn(5, 2), torch.tensor([0, 3, -1, 3, 0])
    program = torch.export.export(Pool(), inputs)
    kept = program.run_decompositions({})
    assert any("custom_ops" in str(node.target) for node in kept.graph.nodes)
    composed = program.run_decompositions(library.decompositions())
    assert not any("custom_ops" in str(node.target) for node in composed.graph.nodes)
    torch.testing.assert_close(composed.module()(*inputs), Pool()(*inputs))
