"""Every op in combination with processes, threads, hooks, failures and interruptions."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize

import custom_ops
from benchmarks.answers import first
from custom_ops.registry import FUNCTIONS, leaves
from custom_ops.verify._case import Case, randn_like

CPU = torch.device("cpu")
SIZED_BY_DATA = {"voxels_summing", "voxelize", "hard_voxelize"}  # in those of their calls that name no size
MODULES = {type(module): module for info in FUNCTIONS.values() for module, _ in info.modules()}


@functools.cache  # drawing samples seeds torch's generator, which all threads share
def calls(op, dtype=torch.float32):
    return Case(FUNCTIONS[op], CPU, quick=True).calls(dtype)


def results(op):
    """Return the values, and gradients if there are any, of the op's samples."""
    found = []
    for call in calls(op):
        inputs = call.inputs
        outputs = call.with_tensors(inputs, call.input_keys).run()
        found += [y.detach() for y in outputs]
        outputs = [y for y in outputs if y.requires_grad]
        if outputs:
            found += torch.autograd.grad(outputs, inputs, randn_like(outputs, seed=1), allow_unused=True)
    return [t for t in found if t is not None]


def all_results():
    return {op: results(op) for op in FUNCTIONS}


def same(actual, expected):
    assert actual.keys() == expected.keys()
    for op in expected:
        torch.testing.assert_close(
            actual[op], expected[op], rtol=0, atol=0, equal_nan=True, msg=lambda m, op=op: op + m
        )


@pytest.fixture(scope="module")
def expected():
    torch.relu(torch.randn(1 << 20)).sum()  # starts torch's threads
    return all_results()


# ---------------------------------------------------------------- processes and threads


class Results(torch.utils.data.Dataset):
    def __len__(self):
        return len(FUNCTIONS)

    def __getitem__(self, i):
        return results(list(FUNCTIONS)[i])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader(start, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning about forking a process with threads is expected
        loader = torch.utils.data.DataLoader(Results(), batch_size=None, num_workers=2, multiprocessing_context=start)
        found = [[t.clone() for t in ts] for ts in loader]
    same(dict(zip(FUNCTIONS, found)), expected)


def test_eight_threads_at_once(expected):
    begin = threading.Barrier(8)

    def run():
        begin.wait()
        return all_results()

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(run) for _ in range(8)]:
            same(future.result(), expected)


# ---------------------------------------------------------------- modes of autograd


def test_deterministic_algorithms(expected):
    try:
        torch.use_deterministic_algorithms(True)
        same(all_results(), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_anomaly_mode(expected):
    with warnings.catch_warnings(), torch.autograd.detect_anomaly():
        warnings.simplefilter("ignore")
        same(all_results(), expected)


def test_saved_tensors_on_disk(expected, tmp_path):
    def pack(tensor):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.pt"
        torch.save(tensor, path)
        return path

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.load):
        same(all_results(), expected)
    assert any(tmp_path.iterdir())


@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(op, mode):
    for call in calls(op):
        wanted = call.run()
        with mode():
            found = call.run()
            assert not any((y * 1).requires_grad for y in found)
        torch.testing.assert_close(found, [y.detach() for y in wanted], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_gradients_accumulate(op):
    for call in calls(op):
        inputs = call.inputs
        for _ in range(2):
            outputs = [y for y in call.with_tensors(inputs, call.input_keys).run() if y.requires_grad]
            if outputs:
                torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        if outputs:
            once = torch.autograd.grad(
                [y for y in call.with_tensors(inputs, call.input_keys).run() if y.requires_grad],
                inputs,
                [torch.ones_like(y) for y in outputs],
                allow_unused=True,
            )
            for x, gradient in zip(inputs, once):
                torch.testing.assert_close(
                    x.grad, gradient if gradient is None else gradient + gradient, equal_nan=True
                )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_shapes_on_the_meta_device(op, dtype):
    """The public function works on meta tensors; the battery tests the ops that it calls."""
    for call in calls(op, dtype):
        try:
            on_meta = call.with_tensors([t.to("meta") for t in call.tensors]).run()
        except RuntimeError as error:
            if op not in SIZED_BY_DATA or "data-dependent shape" not in str(error):
                raise
            continue
        assert [(y.shape, y.dtype) for y in on_meta] == [(y.shape, y.dtype) for y in call.run()]
        assert all(y.is_meta for y in on_meta)


@pytest.mark.parametrize(
    "op", [op for op, info in FUNCTIONS.items() if "k" in inspect.signature(info.function).parameters]
)
def test_the_first_k_of_a_symbolic_number(op):
    def loss(scores, labels):
        return FUNCTIONS[op].function(scores, labels, k=scores.shape[0] - 1)

    scores, labels = torch.randn(5), torch.tensor([2, 0, 1, 1, 0])
    traced = make_fx(loss, tracing_mode="symbolic")(scores, labels)
    longer = torch.randn(7), torch.tensor([2, 0, 1, 1, 0, 2, 0])
    torch.testing.assert_close(traced(*longer), loss(*longer))


# ---------------------------------------------------------------- modules


def test_modules_not_in_the_registry_survive_too():
    """The battery saves and copies the modules of the registry; this test covers the others."""
    modules = {
        m for m in map(vars(custom_ops).get, custom_ops.__all__) if isinstance(m, type) and issubclass(m, nn.Module)
    }
    others = [
        custom_ops.BiasReLU(3),
        custom_ops.BiasLeakyReLU(3, 0.2),
        custom_ops.ReLUDropout(0.3),
        custom_ops.LiftSplat((4, 4), (2, 2), (1.0, 2.0), (0, 0, 0), (1, 1, 1), (2, 2, 1)),
    ]
    assert modules - MODULES.keys() <= {type(m) for m in others}
    for module in others:
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert repr(twin) == repr(module)
            torch.testing.assert_close(twin.state_dict(), module.state_dict())


def training(model, x, steps=3, **parameters):
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        y = torch.func.functional_call(model, parameters, (x,)) if parameters else model(x)
        loss = y.square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def model_of(activation):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 2))


@pytest.mark.parametrize("op", [name for name, info in FUNCTIONS.items() if info.modules()])
def test_hooks(op):
    info, arguments = FUNCTIONS[op], calls(op)[0].tensors
    inputs, seen = leaves(arguments), []
    for module, kwargs in info.modules():
        seen.clear()
        wanted = first(info.function(*arguments, **kwargs))
        grads = torch.autograd.grad(wanted.sum(), inputs, allow_unused=True)
        module.register_forward_pre_hook(lambda module, args: seen.append("before"))
        module.register_forward_hook(lambda module, args, y: seen.append("forward"))
        module.register_full_backward_pre_hook(lambda module, grads: seen.append("before backward"))
        module.register_full_backward_hook(lambda module, into, out: seen.append("backward"))
        y = first(module(*arguments))
        y.register_hook(lambda grad: seen.append("gradient"))
        found = torch.autograd.grad(y.sum(), inputs, allow_unused=True)
        assert seen == ["before", "forward", "gradient", "before backward", "backward"]
        torch.testing.assert_close((y, *found), (wanted, *grads))


class Positive(nn.Module):
    def forward(self, x):
        return custom_ops.squared_relu(x)


def test_parametrizations():
    """Our parameters can be parametrized, and our ops can parametrize."""
    x = torch.randn(5, 4)
    ours, theirs = model_of(custom_ops.BiasReLU(6)), model_of(nn.ReLU())
    parametrize.register_parametrization(ours[1], "bias", Positive())
    with torch.no_grad():
        ours[1].parametrizations.bias.original.fill_(0.5)
        theirs[0].bias += 0.25
    torch.testing.assert_close(ours(x), theirs(x))
    assert all(a > b for a, b in zip(training(ours, x), training(ours, x)))


def test_functional_call():
    model, x = model_of(custom_ops.BiasReLU(6)), torch.randn(5, 4)
    bias = torch.full((6,), 0.5, requires_grad=True)
    torch.func.functional_call(model, {"1.bias": bias}, (x,)).sum().backward()
    assert model[1].bias.grad is None
    model[1].bias = nn.Parameter(bias.detach().clone())
    model(x).sum().backward()
    torch.testing.assert_close(bias.grad, model[1].bias.grad)


def test_grad_scaler():
    """Under autocast the steps equal those without scaling, and a step is skipped if a gradient overflows."""
    x = torch.randn(8, 4)
    ours, theirs = model_of(custom_ops.LeakyReLU()), model_of(custom_ops.LeakyReLU())
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for model, scale in ((ours, scaler), (theirs, torch.amp.GradScaler("cpu", enabled=False))):
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimiser.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = custom_ops.margin_ranking_loss(*model(x).unbind(-1), torch.ones(8), 0.5)
            scale.scale(loss).backward()
            scale.step(optimiser)
            scale.update()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-2, atol=1e-3)
    before = copy.deepcopy(ours.state_dict())
    optimiser = torch.optim.SGD(ours.parameters(), 0.1)
    optimiser.zero_grad()
    scaler.scale(ours(x * 1e38).square().sum()).backward()
    scaler.step(optimiser)
    scaler.update()
    torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)
    assert scaler.get_scale() == 128


# ---------------------------------------------------------------- failures


def in_a_process(program):
    source = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport test_survival as t\n{program}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


HUGE = {
    "an output": lambda: custom_ops.relu(torch.ones(1).expand(1 << 31)),
    "a mask in backward": lambda: custom_ops.squared_relu(torch.ones(1, requires_grad=True).expand(1 << 31)),
    "a sort": lambda: custom_ops.voxel_csr(torch.zeros(8, dtype=torch.int64), 1 << 31),
    "lists": lambda: custom_ops.pairwise_hinge_loss(torch.ones(1).expand(1 << 31), torch.ones(1).expand(1 << 31)),
}


def run_out_of_memory():
    wanted = all_results()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name, run in HUGE.items():
        with pytest.raises((RuntimeError, MemoryError), match="memory|bad_alloc"):
            run()
        assert name
    same(all_results(), wanted)


def test_out_of_memory():
    """In a limited address space an op raises, and everything works afterwards."""
    in_a_process("t.run_out_of_memory()")


def work_on():
    x = torch.randn(1 << 22, requires_grad=True)
    while True:
        custom_ops.pairwise_mse_loss(custom_ops.relu(x), x.detach()).backward()


def be_interrupted():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores the signal
    wanted = all_results()
    for delay in (0.2, 0.31, 0.43):
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            work_on()
    same(all_results(), wanted)


def test_interruption():
    in_a_process("t.be_interrupted()")


def test_import_needs_no_network():
    in_a_process(
        "import socket\n"
        "def refuse(*args, **kwargs): raise OSError('no network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import custom_ops, custom_ops.verify\n"
        "t.same(t.all_results(), t.all_results())"
    )
