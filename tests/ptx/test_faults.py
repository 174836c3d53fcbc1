"""Faults planted in Triton kernels: the error names each fault, the kernel, the instruction and the line of Python."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from custom_ops.verify.ptx import (
    DeadlockError,
    MisalignedError,
    OrderError,
    OutOfBoundsError,
    PartialWarpError,
    ProgramRaceError,
    RaceError,
    TrapError,
    UninitializedError,
    UnknownInstructionError,
    emulate,
)

N, BLOCK = 1000, 256
GRID = (triton.cdiv(N, BLOCK),)


@triton.jit
def reverse_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Reverse each block through shared memory, which takes a barrier."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0)
    tl.store(out_ptr + at, tl.flip(x, 0), mask=at < n)


@triton.jit
def sum_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + tl.program_id(0), tl.sum(tl.load(x_ptr + at, mask=at < n, other=0)))


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n, other=0), mask=at < n)


@triton.jit
def unmasked_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n, other=0))


@triton.jit
def exchange_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    """Exchange neighbours through global memory. Without a barrier, one thread reads before another has written."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n, other=0), mask=at < n)
    if BARRIER:
        tl.debug_barrier()
    other = tl.load(out_ptr + (at ^ 128), mask=(at ^ 128) < n, other=0)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out_ptr + at, other, mask=at < n)


@triton.jit
def overlapping_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Let the blocks of two programs share an element."""
    at = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n, other=0) + tl.program_id(0), mask=at < n)


@triton.jit
def in_place_kernel(x_ptr, BLOCK: tl.constexpr):
    """Several threads hold each element of a tile that is smaller than the program, and one of them stores it."""
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at, 2 * tl.load(x_ptr + at))


@triton.jit
def counting_kernel(counter_ptr, out_ptr, BLOCK: tl.constexpr):
    """Let all threads read the counter and one of them write it."""
    count = tl.load(counter_ptr)
    tl.store(counter_ptr, count + 1)
    tl.store(out_ptr + tl.arange(0, BLOCK), count)


@triton.jit
def colliding_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Store two elements of a block to one place."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at // 2, tl.load(x_ptr + at, mask=at < n, other=0), mask=at < n)


@triton.jit
def fused_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Sum products by fused multiply-adds, which round one product of each pair; threads differ in which one."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(x * x))


@triton.jit
def running_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Compute a prefix sum that assumes that the programs run one after another."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(out_ptr + tl.program_id(0) * BLOCK - 1, mask=tl.program_id(0) > 0, other=0)
    tl.store(out_ptr + at, before + tl.cumsum(tl.load(x_ptr + at, mask=at < n, other=0)), mask=at < n)


@triton.jit(do_not_specialize=["shift"])
def shifted_kernel(x_ptr, out_ptr, shift, BLOCK: tl.constexpr):
    """Tell the compiler that an odd shift is a multiple of 4."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    moved = tl.max_contiguous(tl.multiple_of(at + shift, 4), 4)
    tl.store(out_ptr + at, tl.load(x_ptr + moved))


@triton.jit
def spinning_kernel(flag_ptr):
    while tl.atomic_add(flag_ptr, 0) == 0:
        pass


@triton.jit
def chained_kernel(x_ptr, flag_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Compute a prefix sum in which each program waits for the one before it."""
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    sums = tl.cumsum(tl.load(x_ptr + at, mask=at < n, other=0))
    while tl.atomic_add(flag_ptr, 0) < program:
        pass
    before = tl.load(out_ptr + program * BLOCK - 1, mask=program > 0, other=0)
    tl.store(out_ptr + at, before + sums, mask=at < n)
    tl.debug_barrier()
    tl.atomic_add(flag_ptr, 1)


@triton.jit
def last_kernel(out_ptr):
    """Let the last program win."""
    tl.atomic_xchg(out_ptr, tl.program_id(0))


@triton.jit
def total_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr, tl.sum(tl.load(x_ptr + at, mask=at < n, other=0)))


@triton.jit
def asserting_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.device_assert(tl.load(x_ptr + tl.arange(0, BLOCK)) >= 0, "negative")


def launch(kernel, dtype=torch.float32, **options):
    x = torch.arange(1, N + 1).to(dtype)
    out = torch.zeros_like(x)
    kernel[GRID](x, out, N, BLOCK=BLOCK, **options)
    return x, out


def line_of(kernel, text):
    """Return the file's name and line of the first line of a kernel with this text."""
    # Triton's cache may know the file by another path.
    file, first = Path(kernel.fn.__code__.co_filename), kernel.fn.__code__.co_firstlineno
    lines = file.read_text().splitlines()
    return next(f"{file.name}:{i}" for i, line in enumerate(lines, 1) if i >= first and text in line)


def without(pattern):
    """Return an edit that removes an instruction from every kernel."""

    def edit(ptx):
        edited, count = re.subn(pattern, "", ptx)
        assert count
        return edited

    return edit


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("seed", [0, 1])
def test_right_kernels_pass(arch, seed):
    with emulate(seed, arch, orders=2):
        x, out = launch(reverse_kernel)
        full = N // BLOCK * BLOCK
        assert torch.equal(out[:full].view(-1, BLOCK), x[:full].view(-1, BLOCK).flip(1))
        x, out = launch(copy_kernel)
        assert torch.equal(x, out)
        x, out = launch(exchange_kernel, BARRIER=True)
        assert torch.equal(out[:128], x[128:256])
        _, out = launch(sum_kernel)
        assert out[0] == 256 * 257 / 2
        _, out = launch(total_kernel, torch.int32)
        assert out[0] == N * (N + 1) // 2


def test_a_missing_barrier():
    for kernel in (sum_kernel, reverse_kernel):
        with emulate(edit=without(r"bar\.sync\s+0;")), pytest.raises(RaceError) as found:
            launch(kernel)
        error = found.value
        assert type(error) is RaceError
        assert error.kernel == kernel.fn.__name__
        assert "shared" in error.instruction
        assert "with no barrier between them" in error.fault
        assert "standard.py:" in error.source  # the file of `tl.sum` and `tl.flip`


def test_a_missing_barrier_of_global_memory():
    with emulate(), pytest.raises(RaceError, match="reads what .* writes, with no barrier .* byte .* of out_ptr"):
        launch(exchange_kernel, BARRIER=False)


def test_a_store_past_the_end():
    with emulate(), pytest.raises(OutOfBoundsError) as found:
        launch(unmasked_kernel)
    error = found.value
    assert error.fault == "write of 8 bytes out of bounds: byte 4000 of out_ptr, which has 4000"
    assert error.program == (3, 0, 0)
    assert error.source.endswith(line_of(unmasked_kernel, "tl.store"))
    assert error.instruction.startswith("st.global") or "st.global" in error.instruction


def test_a_store_past_the_end_of_a_view():
    whole = torch.zeros(2 * N)
    with emulate(), pytest.raises(OutOfBoundsError, match="out_ptr"):
        unmasked_kernel[GRID](torch.ones(N), whole[:N], N, BLOCK=BLOCK)


def test_a_read_of_what_nothing_has_written():
    with emulate():
        x = torch.empty(N)
        x[: N // 2] = 1
        out = torch.empty(N)
        copy_kernel[GRID](x, out, N // 2, BLOCK=BLOCK)
        with pytest.raises(UninitializedError, match=f"byte {N * 2} of x_ptr") as found:
            copy_kernel[GRID](x, out, N, BLOCK=BLOCK)
        assert found.value.source.endswith(line_of(copy_kernel, "tl.load"))
        copy_kernel[GRID](out, torch.empty(N), N // 2, BLOCK=BLOCK)
        with pytest.raises(UninitializedError):  # the first kernel left this half unwritten
            copy_kernel[GRID](out, torch.empty(N), N, BLOCK=BLOCK)


def test_shared_memory_that_nothing_has_written():
    with emulate(edit=without(r"@?%?p?\d*\s*st\.shared[^;]*;")), pytest.raises(UninitializedError, match="shared"):
        launch(sum_kernel)


def test_a_race_between_elements():
    with emulate(), pytest.raises(RaceError, match="writes what .* writes, with no barrier .* of out_ptr"):
        launch(colliding_kernel)


def test_copies_of_elements():
    x = torch.ones(64)
    with emulate():
        in_place_kernel[(1,)](x, BLOCK=64)
        with pytest.raises(RaceError, match="writes what .* reads, with no barrier .* of counter_ptr"):
            counting_kernel[(1,)](torch.zeros(1), torch.zeros(64), BLOCK=64)
    assert (x == 2).all()
    with emulate(strict=True), pytest.raises(RaceError, match="writes what .* reads, with no barrier .* of x_ptr"):
        in_place_kernel[(1,)](x, BLOCK=64)


def test_a_sum_that_threads_round_differently():
    x, out = torch.randn(1 << 14, generator=torch.Generator().manual_seed(0)), torch.zeros(128)
    seen = []
    with emulate(edit=lambda ptx: seen.append(ptx) or ptx):
        fused_kernel[(128,)](x, out, len(x), BLOCK=128)
    assert torch.allclose(out.sum(), (x * x).sum())
    if re.search(r"@%p\d+ st\.shared", seen[0]):  # only one thread of each warp stores, in Triton 3.6
        return
    with emulate(orders=4), pytest.raises(OrderError):
        fused_kernel[(128,)](x, out, len(x), BLOCK=128)


@pytest.mark.parametrize("kernel", [overlapping_kernel, running_kernel])
def test_a_race_between_programs(kernel):
    x, out = torch.ones(N), torch.zeros(N)
    with (
        emulate(),
        pytest.raises(ProgramRaceError, match=r"program \d .* program \d .* in the same launch: .* out_ptr"),
    ):
        kernel[GRID](x, out, N, BLOCK=BLOCK)


def test_a_result_that_depends_on_the_order():
    with emulate(orders=2), pytest.raises(OrderError, match="byte 0 of out_ptr"):
        last_kernel[(64,)](torch.zeros(1, dtype=torch.int32))
    x, out = torch.randn(N, generator=torch.Generator().manual_seed(0)), torch.zeros(1)
    with emulate(orders=8), pytest.raises(OrderError):  # the order of floating-point sums changes them
        total_kernel[GRID](x, out, N, BLOCK=BLOCK)
    with emulate():
        total_kernel[GRID](x, out, N, BLOCK=BLOCK)
        assert torch.allclose(out, x.sum())


def test_a_misaligned_access():
    x = torch.zeros(1028)
    with emulate():
        shifted_kernel[(2,)](x, torch.empty(1024), 4, BLOCK=512)
        with pytest.raises(MisalignedError, match=r"read of 16 bytes at once that isn't aligned: byte \d+ of x_ptr"):
            shifted_kernel[(2,)](x, torch.empty(1024), 1, BLOCK=512)


def test_part_of_a_warp():
    def guarded(ptx):
        """Let only the even threads take part in the first exchange."""
        return re.sub(
            r"shfl\.sync",
            "{ .reg .pred odd; .reg .b32 bit; mov.u32 bit, %tid.x; and.b32 bit, bit, 1; setp.eq.u32 odd, bit, 1;"
            "@odd bra $away; } shfl.sync",
            re.sub(r"ret;", "$away: ret;", ptx, count=1),
            count=1,
        )

    with emulate(edit=guarded), pytest.raises(PartialWarpError, match="only some threads of a warp"):
        launch(sum_kernel)


def test_a_barrier_for_some_threads():
    late = "{ .reg .pred late; .reg .b32 id; mov.u32 id, %tid.x; setp.ge.u32 late, id, 64; @late bar.sync 0; } bar.sync"
    planted = partial(re.sub, r"bar\.sync", late, count=1)
    with emulate(edit=lambda ptx: planted(string=ptx)), pytest.raises(DeadlockError, match="for some threads only"):
        launch(sum_kernel)


def test_waiting_for_what_never_comes():
    with emulate(), pytest.raises(DeadlockError, match="wait for a value that no program"):
        spinning_kernel[(2,)](torch.zeros(1, dtype=torch.int32))


def test_programs_that_wait_for_one_another():
    x = torch.arange(1, N + 1, dtype=torch.int32)
    for seed in range(4):
        out, flag = torch.empty_like(x), torch.zeros(1, dtype=torch.int32)
        with emulate(seed):
            chained_kernel[GRID](x, flag, out, N, BLOCK=BLOCK)
        assert torch.equal(out, x.cumsum(0).int())


def test_a_failed_assertion():
    x = torch.ones(128)
    with emulate():
        asserting_kernel[(1,)](x, BLOCK=128, debug=True)
        x[77] = -1
        with pytest.raises(TrapError, match="negative"):
            asserting_kernel[(1,)](x, BLOCK=128, debug=True)


@pytest.mark.parametrize(
    ("planted", "named"),
    [
        ("frobnicate.b32 %r1, %r1;", "instruction"),
        ("add.rz.f32 %r1, %r1, %r1;", "modifier .rz"),
        ("ld.global.v3.b32 {%r1, %r2, %r3}, [%rd1];", "vector"),
        ("mov.u32 %r1, %smid;", "register %smid"),
        ("bar.sync 1, 64;", "barrier"),
    ],
)
def test_an_unknown_instruction(planted, named):
    with (
        emulate(edit=lambda ptx: ptx.replace("ret;", f"{planted} ret;")),
        pytest.raises(UnknownInstructionError, match=f"knows no such {re.escape(named)}"),
    ):
        launch(copy_kernel)


def test_messages():
    with emulate(), pytest.raises(OutOfBoundsError) as found:
        launch(unmasked_kernel)
    fault, where, instruction, source = str(found.value).splitlines()
    assert fault.startswith("write of 8 bytes out of bounds")
    assert re.fullmatch(r"  in kernel unmasked_kernel, program \(3, 0, 0\), thread \d+", where)
    assert re.match(r"  at .*st\.global", instruction)
    assert source.startswith("  compiled from ") and source.endswith(line_of(unmasked_kernel, "tl.store"))
