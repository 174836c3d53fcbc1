"""What a number is to an op under compilation."""

import torch
from torch import Tensor


def as_tensor(number: float, x: Tensor) -> Tensor:
    """``number`` for x, under compilation: there each value of an op's float argument is another program.

    It isn't rounded to 16 bits, as a number isn't either where it meets a tensor. A product is among the few things
    that Inductor makes of a number without compiling anew.
    """
    return number * torch.ones((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
