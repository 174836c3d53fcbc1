"""The bridge: attach an ``autograd.Function`` to an operator so that it composes with all of PyTorch.

An op is defined in a handful of lines, each of which says one thing once::

    import torch
    from torch import Tensor
    from custom_ops import library

    @library.define("mylib::scale")              # the schema comes from the annotations,
    def scale(x: Tensor, factor: float) -> Tensor:
        return torch.empty_like(x)               # the body is the fake (meta) kernel

    @library.kernel(scale, "cpu", "cuda")        # any callable: Python, a Triton launcher, ...
    def _(x, factor):
        return x * factor

    class Scale(library.Function, op=scale):     # derivatives, in terms of ops only
        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.factor = inputs[1]

        @staticmethod
        def backward(ctx, grad):
            return scale(grad, ctx.factor), None

        @staticmethod
        def jvp(ctx, tangent, _):
            return scale(tangent, ctx.factor)

    @library.vmap(scale)
    def _(info, in_dims, x, factor):
        return scale(x, factor), in_dims[0]

``scale(x, 2.0)`` and ``Scale.apply(x, 2.0)`` now work eagerly, under ``torch.compile``, ``torch.export`` and
``torch.func``, in forward mode and to any order of differentiation.

``torch.library.register_autograd`` would attach a plain ``autograd.Function``, of which ``torch.func`` transforms raise
and forward-mode AD silently returns zeros. The bridge applies the Function one level at a time on the op's ``Autograd``
dispatch key, where functorch unwraps every level; this also saves the re-dispatch and signature binding of each call.
"""

from custom_ops.library._numbers import as_tensor
from custom_ops.library.definition import compose, define, dynamic_size, kernel, override_kernel
from custom_ops.library.function import Function, function_of
from custom_ops.library.rules import autocast, decomposition, decompositions, inductor, sharding, to_front, vmap

__all__ = [
    "Function",
    "as_tensor",
    "autocast",
    "compose",
    "decomposition",
    "decompositions",
    "define",
    "dynamic_size",
    "function_of",
    "inductor",
    "kernel",
    "override_kernel",
    "sharding",
    "to_front",
    "vmap",
]
