"""Public functions of PyTorch and of packages that extend it, with small samples, for ``benchmarks.derivatives``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from custom_ops.registry import Sample


@dataclass(frozen=True)
class Public:
    """A function by its dotted name. ``package`` is the distribution that has it, ``remark`` what its documents say."""

    path: str
    samples: Callable[[], list[Sample]]
    package: str = "torch"
    reference: Callable[..., Any] | None = None
    remark: str = ""
    not_comparable: dict[str, str] = field(default_factory=dict)


def _x(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers that require grad, moved away from 0, where many of the functions have a kink."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x + 0.05 * x.sign()).requires_grad_()


def _p(*shape: int, seed: int = 0) -> Tensor:
    """Return probabilities that require grad, inside (0, 1)."""
    return _x(*shape, seed=seed).detach().sigmoid().requires_grad_()


def _fixed(*shape: int, seed: int = 1) -> Tensor:
    return _x(*shape, seed=seed).detach()


def _classes(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def _call(name: str, *args: Any, package: str = "torch", of: dict[str, Any] | None = None, **kwargs: Any) -> Public:
    """Return the function with one sample; ``of`` has further fields of `Public`."""
    path = name if "." in name else f"torch.nn.functional.{name}"
    return Public(path, lambda: [Sample(args, kwargs)], package, **(of or {}))


def ctc_loss_of_logits(x: Tensor, *rest: Tensor) -> Tensor:
    return F.ctc_loss(x.log_softmax(-1), *rest)


def _softmax(x: Tensor, dim: int) -> Tensor:
    return x.exp() / x.exp().sum(dim, keepdim=True)


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    return x.exp().sum(dim).log()


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, :, None] * b[None]).sum(1)


def _cumsum(x: Tensor, dim: int) -> Tensor:
    assert dim == 1
    return torch.stack([x[:, : i + 1].sum(1) for i in range(x.shape[1])], 1)


def _layer_norm(x: Tensor, shape: list[int], weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred * centred).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def _linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor, options: Any = None) -> Tensor:
    return F.cross_entropy(x @ weight.T, target)


def _chunked() -> Any:
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)  # torch 2.10 doesn't have it
    return options and options(batch_chunk_size=2)


def _sparsemax(x: Tensor, dim: int = -1) -> Tensor:
    """Project onto the simplex: subtract one threshold, with which the positive entries sum to 1."""
    ordered = x.sort(dim, descending=True).values
    k = torch.arange(1, x.shape[dim] + 1, dtype=x.dtype)
    thresholds = (ordered.cumsum(dim) - 1) / k
    size = (ordered > thresholds).sum(dim, keepdim=True)
    return (x - thresholds.gather(dim, size - 1)).clamp(min=0)


def _sparsemax_loss(x: Tensor, target: Tensor) -> Tensor:
    p = _sparsemax(x)
    return 0.5 * (1 - (p * p).sum(-1)) + (p * x).sum(-1) - x.gather(-1, target[:, None])[:, 0]


def _log_prob(hidden: Tensor, weight: Tensor, bias: None, targets: Tensor, temperature: float, *rest: Any) -> Any:
    logits = hidden @ weight.T / temperature
    every = logits.log_softmax(-1)
    entropy = -(every.exp() * every).sum(-1)
    return every.gather(-1, targets[:, None])[:, 0].float(), entropy.float()  # the dtype of all inputs' results


_CHUNKED_NOTE = (
    "Its documentation says that with `options` higher-order and forward-mode derivatives and `torch.func.grad` are "
    "unsupported."
)

PUBLIC: list[Public] = [
    _call("torch.matmul", _x(3, 4), _x(4, 2, seed=1), of={"reference": _matmul}),
    _call("torch.cumsum", _x(3, 4), 1, of={"reference": _cumsum}),
    _call("torch.logsumexp", _x(3, 4), 1, of={"reference": _logsumexp}),
    _call("softmax", _x(3, 4), 1, of={"reference": _softmax}),
    _call("layer_norm", _x(3, 4), [4], _x(4, seed=1), _x(4, seed=2), of={"reference": _layer_norm}),
    *[
        _call(name, _x(3, 4))
        for name in ("relu", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus", "softsign")
    ],
    *[
        _call(name, _x(3, 4))
        for name in ("logsigmoid", "hardswish", "hardtanh", "hardsigmoid", "hardshrink", "softshrink", "tanhshrink")
    ],
    *[_call(name, _x(3, 4), 1) for name in ("log_softmax", "softmin", "glu")],
    _call("prelu", _x(3, 4), _p(4)),
    _call("normalize", _x(3, 4)),
    *[
        _call(name, _x(3, 4), _fixed(3, 4))
        for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "poisson_nll_loss")
    ],
    _call("gaussian_nll_loss", _x(3, 4), _fixed(3, 4), _p(3, 4, seed=2)),
    _call("kl_div", _x(3, 4), _p(3, 4, seed=1)),
    _call("binary_cross_entropy", _p(3, 4), _p(3, 4, seed=1).detach()),
    _call("binary_cross_entropy_with_logits", _x(3, 4), _p(3, 4, seed=1).detach()),
    _call("soft_margin_loss", _x(3, 4), _fixed(3, 4).sign()),
    _call("hinge_embedding_loss", _x(3, 4), _fixed(3, 4).sign()),
    _call("cross_entropy", _x(3, 4), _classes(0, 3, 1), label_smoothing=0.1),
    _call("multi_margin_loss", _x(3, 4), _classes(0, 3, 1)),
    _call("multilabel_soft_margin_loss", _x(3, 4), (_fixed(3, 4) > 0).double()),
    _call("cosine_embedding_loss", _x(3, 4), _x(3, 4, seed=1), torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)),
    _call("triplet_margin_loss", _x(3, 4), _x(3, 4, seed=1), _x(3, 4, seed=2)),
    _call("margin_ranking_loss", _x(5), _x(5, seed=1), _fixed(5, seed=2).sign(), margin=0.3),
    _call(
        "benchmarks.public_functions.ctc_loss_of_logits",
        _x(4, 1, 3), _classes(1, 2)[None], _classes(4), _classes(2),
        of={"remark": "`ctc_loss` is documented for log-probabilities, hence the `log_softmax`."},
    ),
    _call("cosine_similarity", _x(3, 4), _x(3, 4, seed=1)),
    _call("pairwise_distance", _x(3, 4), _x(3, 4, seed=1)),
    _call("torch.cdist", _x(3, 2), _x(4, 2, seed=1)),
    _call("batch_norm", _x(3, 2, 2), None, None, _x(2, seed=1), _x(2, seed=2), training=True),
    _call("group_norm", _x(2, 4, 2), 2, _x(4, seed=1), _x(4, seed=2)),
    _call("instance_norm", _x(2, 2, 3)),
    _call("rms_norm", _x(3, 4), [4], _x(4, seed=1)),
    _call("local_response_norm", _x(2, 3, 2), 2),
    _call("linear", _x(3, 4), _x(2, 4, seed=1), _x(2, seed=2)),
    _call("bilinear", _x(2, 3), _x(2, 2, seed=1), _x(2, 3, 2, seed=2)),
    _call("conv1d", _x(1, 2, 4), _x(2, 2, 2, seed=1)),
    _call("conv_transpose1d", _x(1, 2, 3), _x(2, 2, 2, seed=1)),
    _call("avg_pool1d", _x(1, 2, 4), 2),
    _call("max_pool1d", _x(1, 2, 4), 2),
    _call("max_pool2d", _x(1, 1, 4, 4), 2),
    _call("adaptive_max_pool1d", _x(1, 2, 4), 2),
    _call("adaptive_avg_pool2d", _x(1, 1, 3, 3), 2),
    _call("lp_pool1d", _p(1, 2, 4), 2.0, 2),
    _call("fold", _x(1, 4, 4), (3, 3), (2, 2)),
    _call("unfold", _x(1, 1, 3, 3), (2, 2)),
    _call("pixel_shuffle", _x(1, 4, 2, 2), 2),
    _call("pad", _x(1, 2, 4), (1, 1), mode="reflect"),
    _call("interpolate", _x(1, 1, 3, 3), scale_factor=2, mode="bicubic"),
    _call("grid_sample", _x(1, 1, 3, 3), 0.6 * _fixed(1, 2, 2, 2).tanh(), align_corners=True),
    _call("embedding", _classes(0, 2, 2), _x(3, 2)),
    _call("embedding_bag", _classes(0, 2, 2, 1), _x(3, 2), _classes(0, 2)),
    _call("scaled_dot_product_attention", _x(1, 3, 2), _x(1, 3, 2, seed=1), _x(1, 3, 2, seed=2)),
    Public(
        "torch.nn.functional.linear_cross_entropy",
        lambda: [Sample((_x(4, 2), _x(3, 2, seed=1), _classes(0, 2, 1, 1)), {"options": _chunked()})],
        reference=_linear_cross_entropy,
        remark=_CHUNKED_NOTE,
    ),
    _call("entmax.sparsemax", _x(2, 4), -1, of={"reference": _sparsemax}, package="entmax"),
    _call("entmax.entmax15", _x(2, 4), -1, package="entmax"),
    _call("entmax.entmax_bisect", _x(2, 4), 1.5, package="entmax"),
    _call("entmax.sparsemax_loss", _x(2, 4), _classes(0, 2), of={"reference": _sparsemax_loss}, package="entmax"),
    _call("entmax.entmax15_loss", _x(2, 4), _classes(0, 2), package="entmax"),
    _call(
        "liger_kernel.chunked_loss.functional.liger_fused_linear_simpo",
        _x(2, 3, 2), _x(4, 2, seed=1), torch.tensor([[0, 2, 1], [3, 1, 0]]), None, -100, 0.1, 1.0, 0.0, True, False,
        package="liger-kernel",
    ),
    _call(
        "trl.kernels.ChunkedLogProbFunction.apply",
        _x(3, 2), _x(4, 2, seed=1), None, _classes(0, 3, 1), 1.0, 2, None, 1.0, ("entropy",),
        package="trl",
        of={"reference": _log_prob, "not_comparable": dict.fromkeys(("gradcheck", "gradgradcheck"), "float32")},
    ),
    _call("kornia.losses.focal_loss", _x(2, 3), _classes(0, 2), 0.5, package="kornia"),
    _call("kornia.color.rgb_to_hsv", _p(1, 3, 2, 2), package="kornia"),
    _call("kornia.geometry.subpix.spatial_soft_argmax2d", _x(1, 1, 3, 3), package="kornia"),
    _call("torchsort.soft_rank", _x(2, 4), package="torchsort"),
    _call("torchsort.soft_sort", _x(2, 4), package="torchsort"),
    _call("torch_scatter.scatter_add", _x(5), _classes(0, 1, 1, 0, 2), package="torch-scatter"),
    _call("torch_scatter.scatter_softmax", _x(5), _classes(0, 1, 1, 0, 2), package="torch-scatter"),
]  # fmt: skip

# Lines of plain PyTorch that put a function's numbers in ``got`` and the right ones in ``right``, and print both.
_CENTRAL = """
def slope(f, x, step=1e-5):  # central differences of f, one column for each element of x
    moves = step * torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    return torch.stack([(f(x + move) - f(x - move)) / (2 * step) for move in moves], -1)
"""
_ENTMAX_LOSS = (
    """
import torch
from entmax import LOSS
"""
    + _CENTRAL
    + """
target = torch.tensor([0])
x = torch.tensor([[0.1, 0.5, -0.2]], dtype=torch.float64, requires_grad=True)

def gradient(x, create_graph=False):
    x = x if x.requires_grad else x.requires_grad_()
    loss = LOSS(x, target).sum() + x.pow(2).sum()
    return torch.autograd.grad(loss, x, create_graph=create_graph)[0]

(got,) = torch.autograd.grad(gradient(x, create_graph=True).pow(2).sum(), x)  # of a gradient penalty
right = slope(lambda x: gradient(x).pow(2).sum(), x.detach()).view(1, 3)
print("gradient of the penalty:", got)
print("by finite differences:  ", right)
"""
)
_ENTMAX = (
    """
import torch
from entmax import MAP
"""
    + _CENTRAL
    + """
x = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64, requires_grad=True)

def gradient(x, create_graph=False):
    x = x if x.requires_grad else x.requires_grad_()
    return torch.autograd.grad(MAP(x, dim=0)[0], x, create_graph=create_graph)[0]

(got,) = torch.autograd.grad(gradient(x, create_graph=True).pow(2).sum(), x)  # of a gradient penalty
right = slope(lambda x: gradient(x).pow(2).sum(), x.detach())
print("gradient of the penalty:", got)
print("by finite differences:  ", right)
"""
)

CONFIRMATIONS: dict[str, str] = {
    "torch.nn.functional.layer_norm": """
import torch
"""
    + _CENTRAL
    + """
x = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

def f(x, weight):
    return torch.nn.functional.layer_norm(x, [3], weight)[1] ** 2

got = torch.func.hessian(f, (0, 1))(x, weight)[1][0]  # d2f / dweight dx
right = slope(lambda x: torch.func.grad(f, 1)(x, weight), x)
print("func.hessian:\\n", got)
print("by finite differences of the gradient:\\n", right)
""",
    "torch.nn.functional.batch_norm": """
import torch
"""
    + _CENTRAL
    + """
x = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
weight = torch.tensor([2.0], dtype=torch.float64)

def f(x, weight):
    return torch.nn.functional.batch_norm(x.view(3, 1), None, None, weight, training=True)[1, 0] ** 2

got = torch.func.hessian(f, (0, 1))(x, weight)[1][0]  # d2f / dweight dx
right = slope(lambda x: torch.func.grad(f, 1)(x, weight), x)
print("func.hessian:", got)
print("by finite differences of the gradient:", right)
""",
    "torch.nn.functional.instance_norm": """
import torch
"""
    + _CENTRAL
    + """
x = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)

def f(x):
    return torch.nn.functional.instance_norm(x.view(1, 1, 3))[0, 0, 1] ** 2

got = torch.func.jacfwd(torch.func.jacfwd(f))(x)
right = slope(torch.func.grad(f), x)
print("jacfwd(jacfwd):\\n", got)
print("by finite differences of the gradient:\\n", right)
""",
    "torch.nn.functional.grid_sample": """
import torch
from torch.nn.functional import grid_sample

def f(image, grid):
    return grid_sample(image, grid, align_corners=True)

images = torch.arange(54.0).view(6, 1, 1, 3, 3)
grids = torch.linspace(-1, 1, 24).view(6, 1, 1, 2, 2)
got = torch.vmap(f, in_dims=(0, 2))(images, grids.movedim(0, 2))
right = torch.stack([f(image, grid) for image, grid in zip(images, grids)])
print("shape by vmap:", tuple(got.shape), "by a loop:", tuple(right.shape))
""",
    "torch.nn.functional.linear_cross_entropy": """
import torch
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy
"""
    + _CENTRAL
    + """
x = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)
weight = torch.tensor([[0.5, 1.0], [2.0, -1.0], [0.0, 1.0]], dtype=torch.float64)
target, direction = torch.tensor([0, 2]), torch.ones_like(x)
options = LinearCrossEntropyOptions(batch_chunk_size=1)

def f(x):
    return linear_cross_entropy(x, weight, target, options=options)

tangent = torch.func.jvp(f, (x,), (direction,))[1]
print("tangent:", tangent)
print("by finite differences:", (f(x + 1e-6 * direction) - f(x - 1e-6 * direction)) / 2e-6)

def gradient(x, create_graph=False):
    x = x if x.requires_grad else x.requires_grad_()
    return torch.autograd.grad(f(x) + x.pow(2).sum(), x, create_graph=create_graph)[0]

x = x.requires_grad_()
(got,) = torch.autograd.grad(gradient(x, create_graph=True).pow(2).sum(), x)  # of a gradient penalty
right = slope(lambda x: gradient(x).pow(2).sum(), x.detach()).view(2, 2)
print("gradient of the penalty:", got)
print("by finite differences:  ", right)
""",
    "entmax.sparsemax_loss": _ENTMAX_LOSS.replace("LOSS", "sparsemax_loss"),
    "entmax.entmax15_loss": _ENTMAX_LOSS.replace("LOSS", "entmax15_loss"),
    "entmax.entmax15": _ENTMAX.replace("MAP", "entmax15"),
    "entmax.entmax_bisect": _ENTMAX.replace("MAP", "entmax_bisect"),
    "torchsort.soft_rank": """
import torch
from torchsort import soft_rank
"""
    + _CENTRAL
    + """
x = torch.tensor([[0.3, 0.1, 0.6]], dtype=torch.float64, requires_grad=True)
weight = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)

def gradient(x, create_graph=False):
    x = x if x.requires_grad else x.requires_grad_()
    return torch.autograd.grad((soft_rank(x).pow(2) * weight).sum(), x, create_graph=create_graph)[0]

(got,) = torch.autograd.grad((gradient(x, create_graph=True) * weight).sum(), x)  # Hessian times weight
right = slope(lambda x: (gradient(x) * weight).sum(), x.detach()).view(1, 3)
print("Hessian times a vector:", got)
print("by finite differences: ", right)
""",
    "liger_kernel.chunked_loss.functional.liger_fused_linear_simpo": """
import torch
from liger_kernel.chunked_loss.functional import liger_fused_linear_simpo
"""
    + _CENTRAL
    + """
x = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 2, 2).requires_grad_()  # one chosen, one rejected
weight = torch.tensor([[1.0, 0.5], [-1.0, 2.0], [0.5, -0.5]], dtype=torch.float64)
target = torch.tensor([[0, 2], [1, 0]])

def gradient(x, create_graph=False):
    x = x if x.requires_grad else x.requires_grad_()
    loss = liger_fused_linear_simpo(x, weight, target, None, -100, 0.1, 1.0, 0.0, True, False)[0]
    return torch.autograd.grad(loss + x.pow(2).sum(), x, create_graph=create_graph)[0]

(got,) = torch.autograd.grad(gradient(x, create_graph=True).pow(2).sum(), x)  # of a gradient penalty
right = slope(lambda x: gradient(x).pow(2).sum(), x.detach()).view(2, 2, 2)
print("gradient of the penalty:", got)
print("by finite differences:  ", right)
""",
}
