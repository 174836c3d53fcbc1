"""The layer LiftSplat: its geometry, and that no mode of running uses an outdated one."""

from __future__ import annotations

import copy
import doctest
import io
import math
import os
import subprocess
import sys
import weakref

import pytest
import torch
import torch.distributed as dist
from processes import together
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

import custom_ops

IMAGE, FEATURES, DEPTHS = (32, 48), (4, 6), [2.0, 3.5, 5.0, 8.0, 12.0]
ORIGIN, VOXEL, GRID = (-10.0, -8.0, -4.0), (1.0, 2.0, 4.0), (20, 8, 2)


def lift_splat(**kwargs) -> custom_ops.LiftSplat:
    return custom_ops.LiftSplat(IMAGE, FEATURES, DEPTHS, ORIGIN, VOXEL, GRID, **kwargs)


def cameras(batch: int = 2, count: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cameras that look all around, each different from the others."""
    generator = torch.Generator().manual_seed(seed)
    shift = torch.rand(batch, count, 4, generator=generator)
    intrinsics = torch.tensor([[30.0, 0, 23.5], [0, 30, 15.5], [0, 0, 1]]).repeat(batch, count, 1, 1)
    intrinsics[..., 0, 0] += 5 * shift[..., 0]
    yaw = torch.arange(count) * 2 * math.pi / count + 0.3 * shift[..., 1]
    cos, sin, zero = yaw.cos(), yaw.sin(), torch.zeros_like(yaw)
    axes = (sin, zero, cos, -cos, zero, sin, zero, zero - 1, zero)  # the axes are right, down, forward
    pose = torch.eye(4).repeat(batch, count, 1, 1)
    pose[..., :3, :3] = torch.stack(axes, -1).unflatten(-1, (3, 3))
    pose[..., 0, 3], pose[..., 2, 3] = shift[..., 2], 1.5 * shift[..., 3]
    return intrinsics, pose


def lifted(batch: int = 2, count: int = 3, channels: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    depth = torch.randn(batch, count, len(DEPTHS), *FEATURES, generator=generator).softmax(2)
    return depth.requires_grad_(), torch.randn(batch, count, channels, *FEATURES, generator=generator).requires_grad_()


def by_hand(depth, features, intrinsics, camera_to_ego, align_corners=False, rounding="floor"):
    """Compute the definition point by point in double precision; also return how many points were in the grid."""
    batch, count, bins, height, width = depth.shape
    bev = torch.zeros(batch, GRID[2], features.shape[2], *GRID[:2], dtype=torch.float64)
    inside = 0
    for b in range(batch):
        for n in range(count):
            inverse = intrinsics[b, n].double().inverse()
            for h in range(height):
                for w in range(width):
                    if align_corners:
                        u, v = w * (IMAGE[1] - 1) / (width - 1), h * (IMAGE[0] - 1) / (height - 1)
                    else:
                        u, v = (w + 0.5) * IMAGE[1] / width - 0.5, (h + 0.5) * IMAGE[0] / height - 0.5
                    ray = inverse @ torch.tensor([u, v, 1.0], dtype=torch.float64)
                    for d in range(bins):
                        point = torch.cat((ray * DEPTHS[d], torch.ones(1)))
                        place = (camera_to_ego[b, n].double() @ point)[:3]
                        cell = [(float(p) - o) / s for p, o, s in zip(place, ORIGIN, VOXEL)]
                        x, y, z = (math.floor(c) if rounding == "floor" else math.trunc(c) for c in cell)
                        if 0 <= x < GRID[0] and 0 <= y < GRID[1] and 0 <= z < GRID[2]:
                            bev[b, z, :, x, y] += depth[b, n, d, h, w].double() * features[b, n, :, h, w].double()
                            inside += 1
    return bev.flatten(1, 2), inside


@pytest.mark.parametrize("kwargs", [{}, {"align_corners": True, "rounding": "trunc"}])
def test_equals_the_definition(kwargs):
    depth, features = lifted()
    bev = lift_splat(**kwargs)(depth, features, *cameras())
    expected, inside = by_hand(depth.detach(), features.detach(), *cameras(), **kwargs)
    assert 0.3 < inside / depth.numel() < 1  # some points are outside of the grid
    torch.testing.assert_close(bev.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_example_of_the_docstring():
    result = doctest.testmod(sys.modules[custom_ops.LiftSplat.__module__])
    assert result.attempted > 0 and result.failed == 0


def test_gradients():
    depth, features = (t.detach().double()[:, :1, :, :2].requires_grad_() for t in lifted(channels=2))
    layer = custom_ops.LiftSplat(IMAGE, (2, FEATURES[1]), DEPTHS, ORIGIN, VOXEL, GRID)
    layer.set_geometry(*cameras(count=1))
    assert torch.autograd.gradcheck(layer, (depth, features), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, (depth, features), fast_mode=True)


def test_examples_may_share_their_cameras():
    intrinsics, pose = (t[0] for t in cameras())
    depth, features = lifted(batch=4)
    each = [t.expand(4, *t.shape) for t in (intrinsics, pose)]
    torch.testing.assert_close(lift_splat()(depth, features, intrinsics, pose), lift_splat()(depth, features, *each))


def test_a_mask_and_the_order_of_dimensions():
    """A pixel that is left out counts nowhere, even if it is NaN; a mask changes nothing for calls without one."""
    layer, turned = lift_splat(), lift_splat(layout="yxzc")
    geometry, (depth, feat) = cameras(), lifted()
    mask = torch.rand(2, 3, 1, *FEATURES) < 0.7
    layer.set_geometry(*geometry)
    bev = layer(depth, feat)
    broken = depth.where(mask, float("nan"))
    chosen, _ = by_hand(depth.where(mask, 0), feat, *geometry)
    for given in ((), geometry):
        torch.testing.assert_close(layer(broken, feat, *given, mask=mask).double(), chosen, rtol=1e-5, atol=1e-5)
        assert torch.equal(layer(depth, feat, *given), bev)
    image = turned(depth, feat, *geometry)
    assert torch.equal(image, bev.unflatten(1, (2, -1)).permute(0, 4, 3, 1, 2))
    with pytest.raises(ValueError, match='layout: expected an order of "cxy" or "cxyz", got \'xy\''):
        lift_splat(layout="xy")
    with pytest.raises(ValueError, match="mask: expected a shape that broadcasts to"):
        layer(depth, feat, mask=mask[:, :2])


def test_an_augmentation_of_the_image_goes_onto_the_intrinsics():
    intrinsics, pose = cameras()
    mirror = torch.tensor([[-1.0, 0, IMAGE[1] - 1], [0, 1, 0], [0, 0, 1]])
    depth, features = lifted()
    bev = lift_splat()(depth.flip(-1), features.flip(-1), mirror @ intrinsics, pose)
    torch.testing.assert_close(bev, lift_splat()(depth, features, intrinsics, pose))


class Counted(custom_ops.LiftSplat):
    computed = 0

    def points(self, *args):
        self.computed += 1
        return super().points(*args)


def test_the_geometry_is_kept_until_a_camera_changes():
    layer = Counted(IMAGE, FEATURES, DEPTHS, ORIGIN, VOXEL, GRID)
    intrinsics, pose = cameras()

    def agrees(computed: int) -> None:
        torch.testing.assert_close(
            layer(*lifted(), intrinsics, pose), lift_splat()(*lifted(), intrinsics, pose), rtol=0, atol=0
        )
        assert layer.computed == computed

    agrees(1)
    agrees(1)
    intrinsics, pose = intrinsics.clone(), pose.clone()  # new tensors with the same values
    agrees(1)
    intrinsics[0, 0, 0, 0] += 1  # the same tensor with a new value
    agrees(2)
    pose[1, 2, 0, 3] += 1
    agrees(3)
    layer.clear_geometry()
    agrees(4)
    intrinsics = intrinsics.double()
    pose = pose.double()
    agrees(5)


def test_cameras_once_and_for_all():
    layer, other = lift_splat(), lift_splat()
    with pytest.raises(ValueError, match="^intrinsics: expected cameras, here or by set_geometry"):
        layer(*lifted())
    layer.set_geometry(*cameras())
    expected = other(*lifted(), *cameras())
    torch.testing.assert_close(layer(*lifted()), expected)
    torch.testing.assert_close(copy.deepcopy(layer)(*lifted()), expected)
    layer.set_geometry(*cameras(seed=1))
    torch.testing.assert_close(layer(*lifted()), other(*lifted(), *cameras(seed=1)))
    layer.clear_geometry()
    with pytest.raises(ValueError, match="^intrinsics: expected cameras"):
        layer(*lifted())


def test_clearing_releases_the_memory():
    layer = lift_splat()
    layer(*lifted(), *cameras())
    kept = [weakref.ref(t) for t in tree_leaves(layer._cached)]
    layer.clear_geometry()
    assert all(reference() is None for reference in kept)


def test_the_geometry_is_no_state():
    layer = lift_splat()
    layer.set_geometry(*cameras())
    assert not layer.state_dict() and not list(layer.buffers())
    fresh = lift_splat()
    fresh.load_state_dict(layer.state_dict())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    torch.testing.assert_close(again(*lifted(), *cameras()), layer(*lifted()))


def test_precision_moves_no_point():
    """Neither the module's dtype nor autocast's moves a point to another voxel; only the values are rounded."""
    layer = lift_splat()
    layer.set_geometry(*cameras())
    expected = layer(*lifted())
    for dtype in (torch.bfloat16, torch.float16):
        depth, features = (t.to(dtype) for t in lifted())
        bev = lift_splat().to(dtype)(depth, features, *cameras())
        torch.testing.assert_close(bev, layer(depth.float(), features.float(), *cameras()).to(dtype))
        layer.to(dtype)
        torch.testing.assert_close(layer(*lifted()), expected, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(lift_splat()(*lifted(), *cameras()), expected, rtol=0, atol=0)


def test_moves_with_the_module():
    layer = lift_splat()
    layer.set_geometry(*cameras())
    layer.to("meta")
    assert layer(*(t.to("meta") for t in lifted())).shape == (2, 10, *GRID[:2])


def test_geometry_of_an_inference_serves_training():
    layer = lift_splat()
    with torch.inference_mode():
        layer(*lifted(), *cameras())
    depth, features = lifted()
    layer(depth, features, *cameras()).sum().backward()
    assert depth.grad is not None and features.grad is not None


@pytest.mark.parametrize("given", [True, False], ids=["cameras given", "cameras set"])
def test_compile(given):
    layer = lift_splat()
    compiled = torch.compile(layer, fullgraph=True)
    for seed in (0, 1):
        ours, theirs = lifted(seed=seed), lifted(seed=seed)
        arguments = cameras(seed=seed) if given else ()
        layer.set_geometry(*cameras(seed=seed))
        got, expected = compiled(*ours, *arguments), layer(*theirs, *arguments)
        torch.testing.assert_close(got, expected)
        got.square().sum().backward()
        expected.square().sum().backward()
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a.grad, b.grad)
    layer.clear_geometry()
    if not given:
        with pytest.raises(Exception, match="intrinsics: expected cameras"):
            compiled(*lifted())


def test_new_cameras_dont_recompile():
    layer = lift_splat()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for seed in range(4):
        layer.set_geometry(*cameras(seed=seed))
        compiled(*lifted(), *cameras(seed=seed))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("given", [True, False], ids=["cameras given", "cameras set"])
def test_export(given, strict):
    layer = lift_splat()
    if not given:
        layer.set_geometry(*cameras())
    arguments = (*lifted(), *(cameras() if given else ()))
    batch = torch.export.Dim("batch", min=2)
    dynamic = ({0: batch},) * 4 if given else None
    program = torch.export.export(layer, arguments, dynamic_shapes=dynamic, strict=strict)
    assert not program.state_dict
    batches = (2, 5) if given else (2,)
    for size in batches:
        arguments = (*lifted(size, seed=1), *(cameras(size, seed=1) if given else ()))
        torch.testing.assert_close(program.module()(*arguments), layer(*arguments))


def test_wrong_arguments():
    intrinsics, pose = cameras()
    depth, features = lifted()
    layer = lift_splat()
    for arguments, message in (
        ((depth[0], features, intrinsics, pose), r"depth: expected \[B, N, D, H, W\]"),
        ((depth[:, :, 1:], features, intrinsics, pose), r"depth: expected \(D, H, W\) = \(5, 4, 6\), got"),
        ((depth[:, 1:], features, intrinsics, pose), r"depth: expected \(B, N\) of the cameras, \[2, 3\], got"),
        ((depth, features[..., 1:], intrinsics, pose), "feat"),
        ((depth, features, intrinsics), "camera_to_ego: expected together with intrinsics"),
        ((depth, features, None, pose), "camera_to_ego: expected together with intrinsics"),
        ((depth, features, pose, intrinsics), r"intrinsics: expected \[B, N, 3, 3\] or \[N, 3, 3\], got"),
        ((depth, features, intrinsics, pose[..., :3, :]), r"camera_to_ego: expected \[B, N, 4, 4\]"),
        ((depth, features, intrinsics, pose[1:]), r"camera_to_ego: expected \[2, 3\] cameras as in intrinsics"),
        ((depth, features, intrinsics.half(), pose), "intrinsics: expected one of float32, float64, got float16"),
        ((depth, features, intrinsics.to("meta"), pose.to("meta")), "intrinsics: expected on cpu as depth, got meta"),
        ((None, features, intrinsics, pose), "depth: expected a tensor, got NoneType"),
        ((depth, features, [1.0], pose), "intrinsics: expected a tensor, got list"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            layer(*arguments)
    for kwargs, message in (
        ({"image_size": (0, 4)}, "image_size: expected at least 1, got 0"),
        ({"feature_size": (4.0, 4)}, "feature_size: expected an integer, got "),
        ({"image_size": 4}, "image_size: expected 2 numbers, got 4"),
        ({"feature_size": (True, 4)}, "feature_size: expected an integer, got "),
        ({"depths": []}, "depths: expected at least one"),
        ({"depths": 5.0}, "depths: expected numbers, got 5.0"),
        ({"depths": torch.ones(2, 2)}, "depths: expected numbers, got tensor"),
        ({"depths": torch.ones(2, device="meta")}, "depths: expected a number, got a tensor on meta"),
        ({"depths": ["near"]}, "depths: expected a number, got str"),
        ({"depths": [math.nan]}, "depths: expected a number, got nan"),
        ({"origin": None}, "origin: expected numbers, got None"),
        ({"origin": torch.zeros(2)}, "origin: expected 3 numbers"),
        ({"voxel_size": torch.zeros(3)}, "voxel_size: expected positive numbers"),
        ({"grid_size": 4}, "grid_size: expected 3 numbers, got 4"),
        ({"grid_size": (4, 4)}, "grid_size: "),
        ({"voxel_size": (1.0, 0.0, 1.0)}, "voxel_size: "),
        ({"rounding": "up"}, "rounding: "),
        ({"align_corners": 1}, "align_corners: expected True or False"),
    ):
        right = {"image_size": IMAGE, "feature_size": FEATURES, "depths": DEPTHS, "origin": ORIGIN}
        right |= {"voxel_size": VOXEL, "grid_size": GRID}
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            custom_ops.LiftSplat(**(right | kwargs))


def test_singular_intrinsics():
    intrinsics, pose = cameras()
    with pytest.raises(RuntimeError, match="singular"):
        lift_splat()(*lifted(), torch.zeros_like(intrinsics), pose)


def worker() -> None:
    """Check that processes with cameras of their own, new ones in most steps, get the gradients of one process."""
    rank = dist.get_rank()

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = torch.nn.Conv2d(3, len(DEPTHS) + 4, 1)
            self.lift_splat = lift_splat()
            self.norm = torch.nn.BatchNorm2d(8)  # its buffers are broadcast

        def forward(self, images, intrinsics, pose):
            x = self.encoder(images.flatten(0, 1)).unflatten(0, images.shape[:2])
            depth, features = x.split((len(DEPTHS), 4), 2)
            return self.norm(self.lift_splat(depth.softmax(2), features, intrinsics, pose))

    net = Net()
    parallel, alone = DistributedDataParallel(copy.deepcopy(net)), copy.deepcopy(net)
    for step in range(3):
        parts = []
        for process in range(2):
            seed = 10 * process + min(step, 1)  # the last step repeats the cameras of the one before
            images = torch.randn(2, 3, 3, *FEATURES, generator=torch.Generator().manual_seed(seed + 100 * step))
            parts.append((images, *cameras(seed=seed)))
        parallel.zero_grad()
        alone.zero_grad()
        parallel(*parts[rank]).square().mean().backward()
        for part in parts:
            (alone(*part).square().mean() / 2).backward()
        for ours, whole in zip(parallel.module.parameters(), alone.parameters()):
            torch.testing.assert_close(ours.grad, whole.grad)
    assert torch.equal(parallel.module.lift_splat._cached.sources[0], cameras(seed=10 * rank + 1)[0])


def test_two_processes_agree_with_one() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


if __name__ == "__main__":
    together(2, worker)
