"""What one-bit activations promise beyond the battery: torch's values bit by bit, and what they save."""

from __future__ import annotations

import pytest
import torch

import custom_ops

FLOATING = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def special(dtype: torch.dtype) -> torch.Tensor:
    nan, inf, tiny = float("nan"), float("inf"), torch.finfo(dtype).tiny
    values = [0.0, -0.0, nan, -nan, inf, -inf, tiny, -tiny, tiny / 2, -tiny / 2, 1.0, -1.0]
    return torch.tensor(values * 3, dtype=dtype)[:-1]  # 35 of them: vectors and a tail


@pytest.mark.parametrize("dtype", FLOATING)
def test_relu_is_torchs_at_special_values(dtype):
    ours, theirs = special(dtype).requires_grad_(), special(dtype).requires_grad_()
    y, expected = custom_ops.relu(ours), torch.relu(theirs)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    grad = torch.arange(1, 36).to(dtype)
    y.backward(grad)
    expected.backward(grad)
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 31, 1000, 1 << 17])
@pytest.mark.parametrize("dtype", FLOATING)
def test_relu_keeps_one_bit_per_element(n, dtype):
    saved = []
    x = torch.randn(n, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = custom_ops.relu(x)
    assert saved
    assert sum(t.untyped_storage().nbytes() for t in saved) <= n / 8 + 64
    grad = torch.randn(n, dtype=dtype)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], torch.where(x > 0, grad, 0))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 2, 4, 5)])
def test_relu_keeps_channels_last(shape):
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = torch.randn(shape).to(memory_format=layout).requires_grad_()
    y = custom_ops.relu(x)
    assert y.is_contiguous(memory_format=layout)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert gradient.is_contiguous(memory_format=layout)
    assert torch.equal(y, torch.relu(x))


def test_relu_takes_any_strides():
    x = torch.randn(4, 6, 8)
    for view in (x.transpose(0, 2), x[:, ::2], x[1:, 1:, 1:], x[:, :1].expand(4, 6, 8), x.flip(0)):
        assert torch.equal(custom_ops.relu(view), torch.relu(view))
