"""# A tour of autograd

This tour repeats the classic lessons with the ops of this package. `python -m examples.autograd_tour` runs it and
compares each result with the one shown here.

>>> import torch, custom_ops

## The gradient of a scalar

y = 2 xᵀx has the gradient 4x. For x ≥ 0 one of the two factors may go through `relu`.

>>> x = torch.arange(4.0, requires_grad=True)
>>> y = 2 * custom_ops.relu(x) @ x
>>> y
tensor(28., grad_fn=<DotBackward0>)
>>> y.backward()
>>> x.grad
tensor([ 0.,  4.,  8., 12.])
>>> bool((x.grad == 4 * x).all())
True

## Gradients add up

A second backward adds to `x.grad`, until it is set to zero.

>>> custom_ops.relu(x).sum().backward()
>>> x.grad
tensor([ 0.,  5.,  9., 13.])
>>> x.grad.zero_()
tensor([0., 0., 0., 0.])
>>> custom_ops.relu(x).sum().backward()
>>> x.grad
tensor([0., 1., 1., 1.])

## A vector needs a gradient

Backward starts from dL/dy. It has a default, 1, only for a scalar y.

>>> x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
>>> y = custom_ops.scale_gradient(x, 2 * x.detach())
>>> y.backward()
Traceback (most recent call last):
RuntimeError: grad can be implicitly created only for scalar outputs

`y.sum().backward()` is `y.backward(torch.ones_like(y))`. The value of y is x; the layer multiplies the
incoming gradient by 2x.

>>> y.sum().backward()
>>> x.grad
tensor([2., 4., 6.])
>>> x.grad = None
>>> custom_ops.scale_gradient(x, 2 * x.detach()).backward(torch.ones_like(x))
>>> x.grad
tensor([2., 4., 6.])

## Detached tensors are constants

With u = relu(x)² the derivative of u · x is 3x². If u is detached, the derivative is u.

>>> x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
>>> u = custom_ops.relu(x) ** 2
>>> torch.autograd.grad((u * x).sum(), x, retain_graph=True)[0]
tensor([ 3., 12., 27.])
>>> torch.autograd.grad((u.detach() * x).sum(), x)[0]
tensor([1., 4., 9.])

u itself still has its graph and its own derivative, 2x.

>>> torch.autograd.grad(u.sum(), x)[0]
tensor([2., 4., 6.])

## A graph is for one backward

Backward frees what the graph saved, here relu's bits, unless it is told to retain it.

>>> y = custom_ops.relu(x).sum()
>>> y.backward(retain_graph=True)
>>> y.backward()
>>> x.grad
tensor([2., 2., 2.])
>>> y.backward()  # doctest: +ELLIPSIS
Traceback (most recent call last):
RuntimeError: Trying to backward through the graph a second time ...

## Several outputs

`torch.autograd.backward` takes several tensors, each with its dL/dy, and adds up their gradients.

>>> x = torch.tensor([1.0, 2.0], requires_grad=True)
>>> outputs = [custom_ops.relu(x), custom_ops.reverse_gradient(x)]
>>> torch.autograd.backward(outputs, grad_tensors=[torch.tensor([1.0, 10.0]), torch.tensor([0.5, 0.5])])
>>> x.grad
tensor([0.5000, 9.5000])

## Only some inputs

`inputs=` selects the leaves that accumulate a gradient; the others are left alone.

>>> better, worse = (torch.tensor([s], requires_grad=True) for s in (0.2, 0.5))
>>> loss = custom_ops.margin_ranking_loss(better, worse, torch.ones(1))
>>> loss.backward(inputs=[better])
>>> better.grad, worse.grad
(tensor([-1.]), None)

## Why the backward of `VoxelsSumming` needs its mask

Points are summed by voxel. The gradient of a sum doesn't depend on the values: each point gets the gradient of its
voxel. To find that voxel, the FIERY class keeps a mask of each voxel's last point and counts along it; ours keeps where
each voxel begins. Without it, the two gradients below couldn't be distributed to three points.

>>> x = torch.tensor([[1.0], [2.0], [4.0]], requires_grad=True)
>>> geometry, ranks = torch.tensor([[0, 0], [0, 0], [0, 1]]), torch.tensor([0, 0, 1])
>>> sums, voxels = custom_ops.VoxelsSumming.apply(x, geometry, ranks)
>>> sums.backward(torch.tensor([[10.0], [20.0]]))
>>> x.grad.flatten()
tensor([10., 10., 20.])

## The derivative of a derivative

`create_graph=True` records the backward pass as well. The third power of relu has the second derivative 6x.

>>> x = torch.tensor([-1.0, 1.0, 2.0], requires_grad=True)
>>> (first,) = torch.autograd.grad(custom_ops.relu(x).pow(3).sum(), x, create_graph=True)
>>> first.detach()
tensor([ 0.,  3., 12.])
>>> torch.autograd.grad(first.sum(), x)[0]
tensor([ 0.,  6., 12.])

A layer that changes gradients does so in each pass: here by a factor of 2 in the first pass, and twice in the second.

>>> def cube(x):
...     return custom_ops.scale_gradient(x, 2.0) ** 3
>>> (first,) = torch.autograd.grad(cube(x).sum(), x, create_graph=True)
>>> first.detach(), torch.autograd.grad(first.sum(), x)[0]
(tensor([ 6.,  6., 24.]), tensor([-24.,  24.,  48.]))

## Nothing to differentiate

There is no graph if no input requires a gradient.

>>> custom_ops.relu(torch.ones(2)).sum().backward()
Traceback (most recent call last):
RuntimeError: element 0 of tensors does not require grad and does not have a grad_fn
"""

from __future__ import annotations

import argparse
import doctest
import re
import sys
from collections.abc import Sequence

PAGE = (__doc__ or "").strip()


def markdown() -> str:
    """Return the page with its examples fenced, which becomes docs/autograd_tour.md."""
    block = r"(?m)^>>>(?:.+\n?)+"
    return re.sub(block, lambda found: f"```python\n{found[0].rstrip()}\n\n```\n", PAGE) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.autograd_tour", description=PAGE.split("\n")[2])
    parser.add_argument("--markdown", action="store_true", help="print the page for docs/ and run nothing")
    if parser.parse_args(argv).markdown:
        print(markdown(), end="")
        return 0
    print(PAGE)
    tour = doctest.DocTestParser().get_doctest(PAGE, {}, "autograd_tour", None, None)
    failed = doctest.DocTestRunner().run(tour).failed
    print(f"\n{failed} results differ" if failed else "\nevery result is as shown")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
