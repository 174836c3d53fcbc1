"""Python numbers as arguments of ops under compilation."""

import torch
from torch import Tensor


def as_tensor(number: float, x: Tensor) -> Tensor:
    """Return ``number`` as a tensor, so that a new value doesn't recompile the program, as a new float argument would.

    The tensor isn't rounded to 16 bits, since PyTorch doesn't round a number that meets a 16-bit tensor. It is made by
    a product, which Inductor can compute from a number without compiling anew.
    """
    return number * torch.ones((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
