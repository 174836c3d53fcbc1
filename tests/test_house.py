"""The laws of the house: the names that the package may use, the effects of importing it, and what is an op."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import custom_ops
from custom_ops import activation, ranking, shaping, voxel
from custom_ops.registry import REGISTRY, OpInfo
from custom_ops.verify._case import Case, check_same_bits, everything
from custom_ops.verify._tracing import records

ROOT = Path(__file__).resolve().parents[1]
# These patterns match modules, paths and commands that only a checkout has.
CHECKOUT = re.compile(r"\b(benchmarks|examples|docs)(\.\w|/)|(-m|import|from) (benchmarks|examples|docs)\b")
FAMILIES = (activation, ranking, shaping, voxel)
# These are names that users of the originals know, and classes that stand for no function.
KNOWN = {"CustomReLU", "VoxelsSumming", "VoxelsSummingLayer"}
ALONE = {"LiftSplat", "Conversion", "ConvertedActivation"}
FORMER = {
    "MarginRanking": "MarginRankingLossFunction",
    "GradientClipping": "ClipGradientFunction",
    "GradientNormClipping": "ClipGradientNormFunction",
    "GradientScaling": "ScaleGradientFunction",
    "StraightThroughEstimator": "StraightThroughFunction",
    "SurrogateStep": "SurrogateGradientFunction",
}


@pytest.mark.parametrize("folder", ["custom_ops", "triton_kernels", "csrc"])
def test_the_package_names_nothing_that_is_only_in_a_checkout(folder: str) -> None:
    sources = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h")]
    assert len(sources) > 10
    for path in sources:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not CHECKOUT.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_each_public_name_is_listed_once() -> None:
    for family in FAMILIES:
        assert sorted(family.__all__) == list(dict.fromkeys(sorted(family.__all__)))
        for path in Path(str(family.__file__)).parent.glob("*.py"):
            assert path.name == "__init__.py" or "__all__" not in path.read_text(), path
    assert sorted(custom_ops.__all__) == sorted(name for family in FAMILIES for name in family.__all__)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_fx_keeps_each_public_function_as_one_node() -> None:
    for family in FAMILIES:
        functions = [getattr(family, name) for name in family.__all__ if not isinstance(getattr(family, name), type)]
        for function in [function for function in functions if function is not custom_ops.convert_activations]:
            first = next(iter(inspect.signature(function).parameters))
            graph = torch.fx.symbolic_trace(lambda x: function(**{first: x})).graph  # noqa: B023
            assert [node.target for node in graph.nodes][1:] == [function, "output"]
            with pytest.raises(RuntimeError, match=rf"custom_ops.{function.__name__}: torch.jit.script can't compile"):
                torch.jit.script(function)


def test_each_public_function_is_compiled_by_itself() -> None:
    """Compilations of one function don't count towards Dynamo's limit for another."""
    with torch._dynamo.config.patch(recompile_limit=1):
        for name in ("relu", "relu6", "leaky_relu", "squared_relu"):
            x = torch.randn(3)
            function = getattr(custom_ops, name)
            assert torch.equal(torch.compile(function, backend="eager", fullgraph=True)(x), function(x))


def test_names_can_be_guessed() -> None:
    """A function is called foo_bar, its layer FooBar, and its autograd Function FooBarFunction."""
    functions = {name for name in custom_ops.__all__ if not isinstance(getattr(custom_ops, name), type)}
    assert all(re.fullmatch(r"[a-z]+[0-9]*(_[a-z0-9]+)*", name) for name in functions)
    guessed = {name.replace("_", "") for name in functions}
    for name in set(custom_ops.__all__) - functions - KNOWN - ALONE:
        of = getattr(custom_ops, name)
        assert issubclass(of, (torch.nn.Module, torch.autograd.Function)), name
        assert name.endswith("Function") == issubclass(of, torch.autograd.Function), name
        assert re.fullmatch(r"([A-Z][A-Za-z0-9]*)", name) and name.removesuffix("Function").lower() in guessed, name
    assert functions | KNOWN | ALONE <= {*custom_ops.__all__}


@pytest.mark.parametrize(("former", "name"), FORMER.items())
def test_former_names_are_kept(former: str, name: str) -> None:
    assert former not in custom_ops.__all__
    assert getattr(custom_ops, former) is getattr(custom_ops, name)


def test_evidence_is_imported_by_who_asks_for_it() -> None:
    program = """
import sys, custom_ops, custom_ops.verify
assert not [name for name in sys.modules if ".specs" in name]
from custom_ops.registry import REGISTRY
assert len(REGISTRY) > 30 and [name for name in sys.modules if ".specs" in name]
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


# These special cases are calls of their op.
ALIASES: dict[str, Callable[..., Any]] = {
    "relu6": lambda x, inplace=False: custom_ops.hardtanh(x, 0.0, 6.0, inplace),
    "reverse_gradient": lambda x, lambda_=1.0: custom_ops.scale_gradient(x, -lambda_),
}
VARIANTS = [(info, variant) for info in REGISTRY.values() for variant in info.variants]


@pytest.mark.parametrize(("info", "variant"), VARIANTS, ids=lambda info: info.name)
def test_a_special_case_has_no_kernel_of_its_own(info: OpInfo, variant: OpInfo) -> None:
    """An alias gives the bits of the call that it stands for; any other special case reaches only its op's own ops."""
    cpu = torch.device("cpu")
    if variant.name in ALIASES:
        for dtype in variant.dtypes:
            for call in Case(variant, cpu, quick=True).calls(dtype):
                check_same_bits(
                    everything(call), everything(replace(call, function=ALIASES[variant.name])), variant.name
                )
    else:
        reached, of_op = ({r.op for r in records(Case(i, cpu, quick=True), i.dtypes)} for i in (variant, info))
        assert reached <= of_op
