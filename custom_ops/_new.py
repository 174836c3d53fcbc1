"""``python -m custom_ops new NAME``: write a small package with an op of its own and tests that pass.

The op is ``softsign``, with a kernel in C++, one in Triton, derivatives of any order and a batching rule. It is meant
to be replaced, a file at a time.
"""

from __future__ import annotations

import argparse
import keyword
from pathlib import Path
from string import Template

README = """\
# $name

An op for PyTorch: C++ on the CPU, Triton on the GPU, derivatives that hold everywhere.

```sh
pip install torch custom_ops "setuptools>=77" pytest
pip install --no-build-isolation -e .
pytest
```

- `csrc/softsign.cpp` is the CPU kernel, on PyTorch's stable ABI: built once, it runs on every torch from 2.10.
- `$name/triton_kernels.py` is the GPU kernel, imported when it is first called.
- `$name/ops.py` has the schema, the derivatives, the batching rule and the layer.
- `tests/test_softsign.py` holds the op against plain PyTorch, in every mode that PyTorch has.
"""

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$name"
version = "0.1.0"
requires-python = ">=3.10"
dependencies = ["torch>=2.10", "custom_ops"]

[project.optional-dependencies]
gpu = ["triton>=3.6"]
test = ["pytest"]

[tool.setuptools]
packages = ["$name"]

[tool.pytest.ini_options]
testpaths = ["tests"]
"""

SETUP = """\
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

flags = ["-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # torch 2.10 and newer
extension = CppExtension("$name._C", ["csrc/softsign.cpp"], extra_compile_args=flags, py_limited_api=True)
setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
"""

KERNEL = """\
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <stdexcept>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

template <class T>
void softsign_of(const Tensor& x, Tensor& y) {
  const T* in = static_cast<const T*>(x.const_data_ptr());
  T* out = static_cast<T*>(y.mutable_data_ptr());
  torch::stable::parallel_for(0, x.numel(), 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = in[i] / (1 + std::abs(in[i]));
  });
}

Tensor softsign(const Tensor& given) {
  const Tensor x = torch::stable::contiguous(given);
  Tensor y = torch::stable::empty_like(x);
  switch (x.scalar_type()) {
    case ScalarType::Float: softsign_of<float>(x, y); break;
    case ScalarType::Double: softsign_of<double>(x, y); break;
    default: throw std::runtime_error("x: expected float32 or float64");
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL($name, CPU, library) { library.impl("softsign", TORCH_BOX(&softsign)); }
"""

TRITON = """\
import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def softsign_kernel(x_ptr, y_ptr, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < elements)
    tl.store(y_ptr + at, x / (1 + tl.abs(x)), mask=at < elements)


def softsign(x: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        softsign_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK=1024)
    return y
"""

OP = '''\
from pathlib import Path

import torch
from torch import Tensor

from custom_ops import library

__all__ = ["Softsign", "softsign"]

for path in Path(__file__).parent.glob("_C*.so"):
    torch.ops.load_library(path)


@library.define("$name::softsign")  # The schema comes from the annotations.
def _softsign(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)  # This is the fake kernel, which torch.compile runs: only shape and dtype count.


library.kernel(_softsign, "cuda")("$name.triton_kernels:softsign")


class SoftsignFunction(library.Function, op=_softsign):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (1 + x.abs()).square()

    jvp = backward  # Each element has a slope of its own, so both are the same product.


@library.vmap(_softsign)
def _(info, in_dims, x):
    return _softsign(x), in_dims[0]


def softsign(x: Tensor) -> Tensor:
    """Return x / (1 + |x|), of float32 or float64 tensors of any shape."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x: expected a tensor of float32 or float64, got {getattr(x, 'dtype', type(x).__name__)}")
    return _softsign(x)


class Softsign(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return softsign(x)
'''

INIT = '''\
"""An op with derivatives that hold everywhere."""

from $name.ops import Softsign, softsign

__all__ = ["Softsign", "softsign"]
'''

TEST = """\
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels run on the CPU then

import pytest
import torch
from custom_ops.verify import BadCall, Sample, verify

from $name import Softsign, softsign


def test_the_matrix():
    def samples(device, dtype):
        draw = torch.Generator().manual_seed(0)
        sizes = [(5,), (3, 4), (0, 2), ()]
        xs = [torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes]
        return [Sample((x.to(device, dtype).requires_grad_(),), dynamic={0: 0} if x.dim() else {}) for x in xs]

    verify(
        softsign,
        samples,
        reference=torch.nn.functional.softsign,
        modules=lambda: [(Softsign(), {})],
        bad_calls=lambda: [BadCall((torch.ones(2, dtype=torch.int64),), "x: expected a tensor of float32 or float64")],
        dtypes=[torch.float64, torch.float32],
        quick=True,
    ).raise_on_failure()


def test_the_triton_kernel():
    kernels = pytest.importorskip("$name.triton_kernels", reason="triton isn't installed")
    x = torch.randn(3, 1000)
    torch.testing.assert_close(kernels.softsign(x), torch.nn.functional.softsign(x))
"""

FILES = {
    "README.md": README,
    "pyproject.toml": PYPROJECT,
    "setup.py": SETUP,
    "csrc/softsign.cpp": KERNEL,
    "$name/__init__.py": INIT,
    "$name/ops.py": OP,
    "$name/triton_kernels.py": TRITON,
    "tests/test_softsign.py": TEST,
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m custom_ops new", description=__doc__)
    parser.add_argument("name", help="of the package, in lower case: also the folder that is made here")
    name = parser.parse_args(argv).name
    if not (name.isidentifier() and name.islower()) or keyword.iskeyword(name) or name in ("custom_ops", "torch"):
        parser.error(f"name: expected an identifier in lower case that is free, got {name!r}")
    folder = Path(name)
    if folder.exists():
        parser.error(f"name: {folder} exists already")
    for path, text in FILES.items():
        file = folder / Template(path).substitute(name=name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Template(text).substitute(name=name))
        print(file)
    print(f"Next: cd {name} && pip install --no-build-isolation -e . && pytest")
    return 0
