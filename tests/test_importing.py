"""``import custom_ops`` costs and changes little, and what it postpones happens in time, each in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(program: str, folder: Path | None = None) -> str:
    env = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    if folder is not None:
        env["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return done.stdout


def test_an_import_does_little():
    """An import loads few modules, infers few schemas and builds few classes, which once took it a second."""
    run("""
import collections, inspect, sys
import torch
calls = collections.Counter()
def counted(owner, name):
    function = getattr(owner, name)
    def count(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)
    setattr(owner, name, count)
for owner, name in (
    (torch.library, "infer_schema"), (inspect, "signature"), (inspect, "getsource"),
    (torch.library.Library, "__init__"), (torch.library.Library, "impl"),
    (torch.autograd.function.FunctionMeta, "__init__"),
):
    counted(owner, name)
before = set(sys.modules)
import custom_ops
from custom_ops._native import OPS
ops = len(OPS)
assert ops > 40
foreign = {name for name in set(sys.modules) - before if not name.startswith("custom_ops")}
assert foreign <= {"ctypes.util", "graphlib"}, foreign
ours = [name for name in sys.modules if name.startswith("custom_ops")]
assert len(ours) < 64 and not [name for name in ours if ".verify" in name or ".triton_kernels" in name], ours
assert calls["infer_schema"] < 20, calls  # one for each annotation
assert calls["signature"] < 4 * ops, calls
assert not calls["getsource"], calls
assert calls["impl"] < 5 * ops, calls
assert calls["__init__"] <= 10 + 2 * ops, calls  # of a library for each op, and of each class of derivatives itself
""")


def test_an_import_changes_nothing_in_the_process():
    run("""
import sys, threading
import torch
def state():
    found = {}
    for name, module in list(sys.modules.items()):
        if name == "torch" or name.startswith("torch."):
            for attribute, value in list(vars(module).items()):
                found[name, attribute] = id(value)
                if isinstance(value, type) and str(value.__module__).startswith("torch"):
                    found.update({(name, attribute, key): id(inner) for key, inner in vars(value).items()})
    return found
finders, hooks, threads, before = list(sys.meta_path), list(sys.path_hooks), threading.enumerate(), state()
started = []
threading.Thread.start = (lambda start: lambda self: (started.append(self), start(self)))(threading.Thread.start)
settings = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
import custom_ops
assert sys.meta_path == finders and sys.path_hooks == hooks
assert threading.enumerate() == threads and not started
assert (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()) == settings
after = state()
changed = {key for key in before.keys() & after.keys() if before[key] != after[key]}
# torch itself keeps lists of what is registered, and counts.
assert not {key for key in changed if len(key) == 2}, changed
assert not {key for key in changed if len(key) == 3 and not key[2].startswith("__")}, changed
""")


CAPTURE = """
import torch, torch._inductor.config
from torch._inductor.custom_graph_pass import CustomGraphPass
graphs = []
class Look(CustomGraphPass):
    def __call__(self, graph):
        graphs.append([str(node.target) for node in graph.nodes])
    def uuid(self): return None
torch._inductor.config.post_grad_custom_post_pass = Look()
def ours():
    assert graphs
    return [target for graph in graphs for target in graph if "custom_ops" in target or "importing" in target]
"""
BEFORE = {
    "nothing": "",
    "Inductor": "import torch._inductor.compile_fx",
    "a program compiled": "import torch; torch.compile(lambda x: x.sin() + 1)(torch.ones(3))",
}


@pytest.mark.parametrize(
    "before", [pytest.param(b, marks=pytest.mark.full if b in ("nothing", "Inductor") else ()) for b in BEFORE]
)
def test_a_compiler_is_given_the_composition(before):
    """A compiler gets the composition of an op, even if the op is defined after a program was compiled."""
    run(f"""
{BEFORE[before]}
import custom_ops
{CAPTURE}
x = torch.tensor([-1.0, 2.0, 3.0], requires_grad=True)
compiled = torch.compile(lambda x: (custom_ops.relu(2 * x) + 1).sum(), fullgraph=True)
compiled(x).backward()
assert x.grad.tolist() == [0, 2, 2]
assert len(graphs) == 2 and not ours(), graphs
with torch.inference_mode():
    assert compiled(torch.tensor([-1.0, 2.0])).item() == 6
assert not ours(), graphs

from custom_ops import library
@library.define("importing::negated")
def negated(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)
@library.inductor(negated)
def _(x):
    return -x
assert torch.compile(negated)(torch.ones(2)).tolist() == [-1, -1] and not ours(), graphs
""")


@pytest.mark.full
def test_a_composition_is_compiled_from_a_warm_cache(tmp_path):
    program = """
import torch, custom_ops
from torch._dynamo.utils import counters
x = torch.tensor([-1.0, 2.0, 3.0], requires_grad=True)
torch.compile(lambda x: (custom_ops.relu(2 * x) + 1).sum())(x).backward()
assert x.grad.tolist() == [0, 2, 2]
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""
    assert [run(program, tmp_path).split() for _ in range(2)] == [["0", "2"], ["2", "0"]]


@pytest.mark.full
def test_a_program_that_another_process_exported_is_packaged_with_the_composition(tmp_path):
    """`torch.export` keeps the op, and AOTInductor gets its composition though no op has run in this process."""
    run(
        """
import torch, custom_ops
program = torch.export.export(custom_ops.ReLU(), (torch.ones(3),))
assert any("custom_ops" in str(node.target) for node in program.graph.nodes)
assert any("custom_ops" in str(node.target) for node in program.run_decompositions().graph.nodes)
torch.export.save(program, "program.pt2")
""",
        tmp_path,
    )
    run(
        f"""
import custom_ops
{CAPTURE}
import torch._inductor.scheduler
class Stop(Exception): pass
def stop(*args, **kwargs): raise Stop
torch._inductor.scheduler.Scheduler.__init__ = stop  # before C++ is written and compiled
try:
    torch._inductor.aoti_compile_and_package(torch.export.load("program.pt2"), package_path="package.pt2")
except Exception as error:
    assert "Stop" in repr(error) + repr(error.__cause__), error
assert not ours(), graphs
""",
        tmp_path,
    )


DTENSOR = """
import contextlib, os, sys, traceback
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
import torch._dynamo
def main(first):
    import custom_ops
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    def sharded(x, **options):
        return distribute_tensor(x, mesh, [Shard(0)], **options)
    names = {**globals(), **locals()}
    exec(first, names)
    assert names["y"].placements == (Shard(0),)
    dist.destroy_process_group()
for name, first in FIRST.items():
    if not os.fork():  # a process that has imported torch, but not custom_ops
        try:
            main(first)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(name)
"""
FIRST = {
    "eager": """
x = sharded(torch.randn(4, 3)).requires_grad_()
y = custom_ops.relu(x)
y.sum().backward()
assert x.grad.placements == (Shard(0),)
""",
    "inference mode": """
with torch.inference_mode():
    y = custom_ops.relu(sharded(torch.randn(4, 3)))
""",
    "inference mode, the op": """
from custom_ops import library
@library.define("importing::copied")
def copied(x: torch.Tensor, times: int) -> torch.Tensor:
    return torch.empty_like(x)
library.kernel(copied, "cpu")(lambda x, times: times * x)
library.sharding(copied)(lambda x, times: [([Shard(0)], [Shard(0), None])])
with torch.inference_mode():
    x = sharded(torch.randn(4, 3))
    y = copied(x, 2)
    assert torch.equal(copied(x, 3).to_local(), 3 * x.to_local())
""",
    "compiled": """
y = torch.compile(custom_ops.relu, backend="aot_eager", fullgraph=True)(sharded(torch.randn(4, 3)))
""",
    "below autograd": """
from custom_ops import library
@library.compose("importing::outer")
def outer(x: torch.Tensor) -> torch.Tensor:
    return inner(x) * 1
@library.compose("importing::inner")
def inner(x: torch.Tensor) -> torch.Tensor:
    return x * 2
for op in outer, inner:
    library.sharding(op)(lambda x: [([Shard(0)], [Shard(0)])])
y = outer(sharded(torch.randn(4, 3)))
""",
    "a rule that comes later": """
custom_ops.relu(sharded(torch.randn(4, 3)))
from custom_ops import library
@library.compose("importing::late")
def late(x: torch.Tensor) -> torch.Tensor:
    return x * 2
library.sharding(late)(lambda x: [([Shard(0)], [Shard(0)])])
y = late(sharded(torch.randn(4, 3)))
""",
}


def test_a_sharding_rule_is_there_for_the_first_dtensor():
    run(f"FIRST = {FIRST}\n{DTENSOR}")
