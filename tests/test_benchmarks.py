"""Tests of the benchmark harness: its errors, its measurements, its time limits, and its comparison of two runs."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import goals, plan, run, scaling, timing
from benchmarks import measure as measure_module
from benchmarks.compare import changes
from benchmarks.cost_page import write_page
from benchmarks.environment import describe, trouble
from benchmarks.floor import Floor, least_traffic
from benchmarks.measure import FLOOR, OURS, Cell, Effort, Result, Row, label, measure
from benchmarks.memory import peak_bytes
from benchmarks.plan import Peers, Plan
from benchmarks.report import Report, read_json
from benchmarks.table import Benchmark, Target, TimedOp, Unavailable
from benchmarks.tables import TIMED
from benchmarks.timing import Call, interleave, median, spread
from custom_ops.registry import Sample

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
BRIEF = Effort(seconds=0.0, rounds=2, warm_ups=1)
MACHINE = {"cpu": "a CPU", "threads": 2, "isa": "AVX2", "cores": 4, "load": 0.1, "torch": "2.13.0"}


def square(x):
    return x * x


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad


def make(n, device, dtype=torch.float32):
    return (torch.rand(n, device=device).to(dtype).add(0.5).requires_grad_(),)


def benchmark(**changed):
    return Benchmark(**{"sizes": (8, 64), "make": make, "peers": {"torch.square": torch.square}, "unit": "n"} | changed)


def op(function=square, reference=square, name="square", **changed):
    return TimedOp(
        name=name,
        function=function,
        reference=reference,
        samples=lambda device, dtype: [Sample(make(4, device))],
        summary="",
        benchmarks=[benchmark(**changed)],
    )


def cell(info, size=8):
    return Cell(info, info.benchmarks[0], size)


class Clock:
    """A replacement for the harness's clock: each reading advances it by a millisecond, and `pass_` by any time."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.pass_(0.001)
        return self.now

    def pass_(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "clock", clock)
    return clock


def measured(info, size=8, peers=None, effort=BRIEF):
    peers = dict(info.benchmarks[0].peers) if peers is None else peers
    return measure(cell(info, size), peers, CPU, "fresh", effort)


@pytest.fixture(autouse=True)
def _functions_of_the_package(monkeypatch):
    monkeypatch.setattr(TimedOp, "family", property(lambda info: "family"))


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: x * x + 1e-3, "output: 8 of 8 elements are off by up to 0.001"),
        (WrongGradient.apply, "gradient: 8 of 8 elements"),
        (lambda x: (x * x)[:-1], "raised RuntimeError: Mismatch in shape"),
        (lambda x: x * x * math.nan, "output: 8 of 8 elements are off by up to inf"),
        (lambda x: (x * x, torch.arange(8)), "2 outputs, not 1"),
        (lambda x: x.missing, "raised AttributeError"),
    ],
    ids=["value", "gradient", "shape", "nan", "outputs", "raises"],
)
def test_a_wrong_answer_of_ours_is_refused_before_anything_is_timed(function, said):
    result = measured(op(function))
    assert result.rows == []
    assert said in result.wrong, result.wrong
    assert result.wrong.startswith("square, n, 8: ")


def test_a_wrong_second_output_of_ours_is_refused():
    def reference(x):
        return x * x, torch.arange(len(x))

    assert "output: 8 of 8 elements differ" in measured(op(lambda x: (x * x, -1 - torch.arange(8)), reference)).wrong
    assert measured(op(reference, reference)).wrong == ""


def test_small_gradients_are_not_waved_through():
    """The gradient of a mean over many elements is below any absolute tolerance, and a wrong one is still found."""

    class Mean(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.mean()

        @staticmethod
        def backward(ctx, grad):
            return (1.01 * grad / 100_000).expand(100_000)

    mean = op(Mean.apply, torch.mean, sizes=(100_000,))
    assert "gradient: 100000 of 100000" in measured(mean, 100_000).wrong


@pytest.mark.parametrize(("elements", "refused"), [(1_000_000, True), (2_000_001, False)])
def test_a_kink_excuses_one_element_in_a_million(elements, refused):
    def two_are_off(x):
        off = torch.zeros_like(x)
        off[:2] = 1
        return x * x + off

    info = op(two_are_off, sizes=(elements,), peers={})
    assert bool(measured(info, elements).wrong) == refused


def test_the_tolerance_is_that_of_the_dtype():
    for dtype in (torch.bfloat16, torch.float16):
        info = op(sizes=(8,), make=lambda n, device, dtype=dtype: make(n, device, dtype))
        assert measured(info).wrong == ""
        assert measured(replace(info, function=lambda x: 1.1 * x * x)).wrong


def test_without_a_reference_nothing_is_timed():
    with pytest.raises(ValueError, match="square: has no reference to check its answer against"):
        measured(op(reference=None))


def test_the_answer_is_checked_at_the_size_that_the_entry_names():
    def right_when_small(x):
        return x * x if len(x) <= 8 else x * x + 1

    assert measured(op(right_when_small), 64).wrong
    assert measured(op(right_when_small, checked_at=lambda n: min(n, 8)), 64).wrong == ""


def test_a_peer_that_differs_is_marked_and_one_that_raises_is_not_timed():
    def broken(x):
        raise RuntimeError("no such thing")

    result = measured(op(peers={"right": torch.square, "other": torch.abs, "broken": broken}))
    notes = {row.contender: row.note for row in result.rows}
    assert list(notes) == [OURS, "right", "other", FLOOR]
    assert notes["right"] == ""
    assert "elements are off" in notes["other"]
    assert any("other: output: 8 of 8 elements are off" in remark for remark in result.remarks)
    assert any("broken: raised RuntimeError: no such thing" in remark for remark in result.remarks)


# ---------------------------------------------------------------- what is measured


def test_a_row_per_contender_and_direction_and_its_numbers_agree():
    result = measured(op(targets=[Target(64, "torch.square", 0.7), Target(8, "torch.square", 0.9, "forward")]), 64)
    rows = {(row.direction, row.contender): row for row in result.rows}
    assert list(rows) == [
        (direction, contender)
        for direction in ("forward", "backward", "forward+backward")
        for contender in (OURS, "torch.square", FLOOR)
    ]
    for (direction, _), row in rows.items():
        floor, ours = rows[direction, FLOOR], rows[direction, OURS]
        assert row.floors == pytest.approx(row.milliseconds / floor.milliseconds)
        assert row.ours_over_this == pytest.approx(ours.milliseconds / row.milliseconds)
        assert row.gigabytes_per_second == pytest.approx(row.bytes / row.milliseconds / 1e6)
        assert row.rounds == 2
    assert rows["forward", OURS].bytes == rows["backward", OURS].bytes == 2 * 64 * 4
    assert rows["forward+backward", OURS].bytes == 4 * 64 * 4
    assert {place for place, row in rows.items() if row.target} == {("forward+backward", "torch.square")}
    assert rows["forward", OURS].peak_bytes == 64 * 4
    assert rows["backward", OURS].peak_bytes is None


def test_an_op_without_gradients_has_a_forward_only():
    info = op(
        lambda x: x.argsort(stable=True),
        lambda x: x.argsort(stable=True),
        make=lambda n, device: (torch.arange(n),),
        peers={},
    )
    assert [(row.direction, row.contender) for row in measured(info).rows] == [("forward", OURS), ("forward", FLOOR)]


def test_backward_alone_leaves_the_forward_out(clock):
    def slow(x):
        clock.pass_(0.02)
        return x * x

    milliseconds = {r.direction: r.milliseconds for r in measured(op(slow, peers={})).rows if r.contender == OURS}
    assert milliseconds == pytest.approx({"forward": 21, "backward": 1, "forward+backward": 21})


def test_the_benchmarks_own_arguments_go_to_the_op_and_the_reference():
    def scaled(x, factor=1.0):
        return x * factor

    result = measured(op(scaled, scaled, kwargs={"factor": 3.0}, peers={"times 3": lambda x: 3 * x}))
    assert result.wrong == "" and all(row.note == "" for row in result.rows)
    assert {row.table for row in result.rows} == {"n, factor=3.0"}


def test_contenders_take_turns_each_after_an_untimed_call():
    calls = []
    contenders = {name: Call(lambda _, name=name: calls.append(name)) for name in "abc"}
    times = interleave(contenders, seconds=0, device=CPU, rounds=3, warm_ups=1)
    assert "".join(calls) == "abc" + "aabbcc" + "bbccaa" + "ccaabb"
    assert [len(values) for values in times.values()] == [3, 3, 3]


def test_preparation_is_not_timed(clock):
    call = Call(run=lambda state: state, prepare=lambda: clock.pass_(0.02))
    assert median(interleave({"a": call}, 0, CPU, rounds=3)["a"]) == pytest.approx(0.001)


class Device:
    """A CUDA device in virtual time: work that is queued runs after what was queued before, beside the host."""

    def __init__(self, clock):
        self.clock, self.free = clock, 0.0

    def work(self, seconds):
        self.free = max(self.free, self.clock.now) + seconds

    def event(self, enable_timing):
        return Event(self)


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.device.work(0)
        self.at = self.device.free

    def query(self):
        return self.at <= self.device.clock.now

    def synchronize(self):
        self.device.clock.now = max(self.device.clock.now, self.at)

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


@pytest.mark.parametrize("host", [0.00002, 0.0005, 0.03])
def test_time_on_a_gpu_is_without_the_host(clock, monkeypatch, host):
    """The device's time doesn't depend on the time that the host takes to queue each of the kernels."""
    gpu = Device(clock)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: setattr(clock, "now", max(clock.now, gpu.free)))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.work(cycles / 2e9))

    def run(_):
        for _ in range(3):
            clock.pass_(host)
            gpu.work(0.00006)

    device = torch.device("cuda")
    assert timing.seconds_of(Call(run), device) == pytest.approx(3 * 0.00006)
    assert timing.host_seconds_of(Call(run), device) == pytest.approx(3 * host + 0.001)  # reading the clock takes that


def test_time_of_a_call_that_waits_for_the_gpu_includes_the_host(clock, monkeypatch):
    gpu = Device(clock)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    wait = lambda device=None: setattr(clock, "now", max(clock.now, gpu.free))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.work(cycles / 2e9))

    def run(_):
        gpu.work(0.00006)
        wait()
        clock.pass_(0.0002)
        gpu.work(0.00006)

    assert timing.seconds_of(Call(run), torch.device("cuda")) == pytest.approx(0.00032)


def test_spread_is_the_interquartile_range_over_the_median():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == pytest.approx(1.0)


def test_peak_memory_counts_what_lives_at_the_same_time():
    x = torch.ones(1 << 18)
    mib = 1 << 20
    assert peak_bytes(lambda: x * x, CPU) == mib
    assert peak_bytes(lambda: [x * x for _ in range(3)], CPU) == 3 * mib
    assert peak_bytes(lambda: [(x + 1).sum() for _ in range(3)], CPU) == pytest.approx(mib, abs=4096)
    assert peak_bytes(lambda: x.add_(1), CPU) < 4096


def test_the_least_traffic_meets_each_tensor_once():
    x, row = torch.zeros(10, 3, requires_grad=True), torch.zeros(3)
    forward, backward = least_traffic((x, row.expand(10, 3), 2.0), (x * 1, torch.zeros(5, dtype=torch.int64)), [x])
    assert forward == (120 + 12, 120 + 40)
    assert backward == (120, 120)
    assert least_traffic((row,), row, [])[1] == (0, 0)


@pytest.mark.parametrize(("read", "written"), [(64, 64), (64, 16), (16, 64), (0, 64), (64, 0)])
def test_the_floor_writes_and_reads_what_it_says(read, written):
    floor = Floor([(read, written)], CPU)
    ((target, surplus),) = floor()
    assert floor.bytes == read + written
    assert len(target) == written // 4 and not target.any()
    assert (surplus is not None) == (read > written)


def test_an_entrys_own_traffic_replaces_the_estimate():
    rows = measured(op(traffic=lambda n: ((n, 0), (0, 3 * n))), 64).rows
    assert {row.direction: row.bytes for row in rows} == {"forward": 64, "backward": 192, "forward+backward": 256}


# ---------------------------------------------------------------- in time


def test_a_quick_run_takes_the_small_sizes_first_and_a_full_run_table_by_table():
    infos = [op(name="a", sizes=(1, 10, 100)), op(name="b", sizes=(5, 50))]
    assert [(c.info.name, c.size) for c in Plan(infos, 60).cells] == [
        ("a", 1),
        ("b", 5),
        ("a", 10),
        ("b", 50),
        ("a", 100),
    ]
    full = Plan(infos)
    assert [(c.info.name, c.size) for c in full.cells] == [("a", 1), ("a", 10), ("a", 100), ("b", 5), ("b", 50)]
    assert all(full.effort(c) == plan.FULL for c in full.cells)


def test_a_quick_run_shares_what_is_left_and_skips_what_is_bound_to_take_longer(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing, "clock", lambda: now[0])
    quick = Plan([op(name="a", sizes=(10, 100, 1000)), op(name="b", sizes=(10,))], 40)
    a, b, larger, largest = quick.cells
    assert quick.effort(a).limit == 10
    now[0] += 1
    quick.done(a, Result(preparation=0.3))
    assert quick.effort(b).limit == 13  # the time that the first cell left over is shared out
    now[0] += 13
    quick.done(b, Result(preparation=0.5))
    assert quick.effort(larger).limit == 13
    quick.done(larger, Result(preparation=0.4))
    assert quick.effort(largest) is None  # it would take 4 seconds, more than an eighth of the 26 left
    quick.left, quick._last = 1, {}
    assert quick.effort(largest).limit == 26
    now[0] += 100
    assert Plan([op()], 0).effort(a) is None


def test_sizes_are_compared_by_their_product():
    assert plan.elements((4, (2, 8))) == 64
    assert plan.elements(1000) == 1000
    assert plan.elements("nuScenes") == plan.elements(0) == 1


def test_ours_is_measured_first_and_then_the_peers_that_there_is_time_for():
    effort = Effort(rounds=3, warm_ups=1)  # each contender is called 21 times
    once = {"slow": 1.0, OURS: 0.1, "quick": 0.05}
    assert effort.affordable(once, 2.0) == []
    assert effort.affordable(once, 3.0) == [OURS]
    assert effort.affordable(once, 4.0) == [OURS, "quick"]
    assert effort.affordable(once, 30.0) == [OURS, "quick", "slow"]


def test_a_slow_peer_is_left_out_of_a_quick_run_and_named(clock):
    def slow(x):
        clock.pass_(0.2)
        return x * x

    effort = replace(plan.QUICK, limit=3.0)
    result = measured(op(peers={"slow": slow, "torch.square": torch.square}), effort=effort)
    assert clock.now < 3
    assert {row.contender for row in result.rows} == {OURS, "torch.square", FLOOR}
    assert result.remarks == ["square, n, 8: no time for slow"]


def test_scaling_goes_on_until_time_or_memory_would_run_out(monkeypatch):
    info = op(sizes=(8,))
    info = replace(info, benchmarks=[*info.benchmarks, benchmark(sizes=((2, 3),), unit="not by one number")])
    sizes = list(scaling.SIZES)

    def reached(seconds, bytes_of):
        scaled = scaling.Scaling([info])
        assert [c.size for c in scaled.cells] == sizes
        done = []
        for c in scaled.cells:
            if scaled.effort(c) is not None:
                done.append(c.size)
                rows = [row(OURS, 1e3 * seconds(c.size), 1.0, bytes=bytes_of(c.size))]
                scaled.done(c, Result(rows=rows))
        return done

    monkeypatch.setattr(scaling, "_memory", lambda: 1 << 34)
    assert reached(lambda n: 1e-9 * n, lambda n: 1) == sizes
    assert reached(lambda n: 2e-9 * n * n, lambda n: 1) == [10**2, 10**3, 10**4]  # 10^5 would take 20 s
    assert reached(lambda n: 1e-9 * n, lambda n: 512 * n) == [10**2, 10**3, 10**4, 10**5, 10**6]


def test_scaling_at_a_table_s_own_sizes():
    cells = scaling.Scaling([op(scaling=(20, 40, 4_000_000))]).cells
    assert [cell.size for cell in cells] == [20, 40, 4_000_000]
    assert [cell.benchmark.checked_at(cell.size) for cell in cells] == [20, 40, scaling.CHECKED]
    # Where the size counts something large, the first size is enough.
    (table,) = scaling.scaled(op(scaling=(1, 90))).benchmarks
    assert table.checked_at(90) == 1


def test_a_table_whose_data_cannot_be_had_is_skipped():
    def make(size, device):
        raise Unavailable("The example needs data, which aren't here.\npip said: nothing")

    result = measured(op(make=make))
    assert result.remarks == ["square, n, 8: skipped: The example needs data, which aren't here."]
    assert not result.rows and not result.wrong


def test_scaling_of_list_losses_is_in_the_length_of_one_list(monkeypatch):
    monkeypatch.setattr(TimedOp, "family", "ranking")
    table, *_ = scaling.scaled(TIMED["pairwise_logistic_loss"]).benchmarks
    assert (table.sizes[0], table.sizes[-1]) == (32, 100_000)
    assert [x.shape for x in table.make(32, CPU)] == [(1, 32), (1, 32)]
    assert [table.checked_at(n) for n in (32, 100_000)] == [32, scaling.CHECKED_LENGTH]


def test_scaling_checks_the_answers_at_a_size_that_the_reference_can_do():
    (table,) = scaling.scaled(op(checked_at=lambda n: min(n, 5000))).benchmarks
    assert [table.checked_at(n) for n in (100, 10**4, 10**8)] == [100, 5000, 5000]
    (table,) = scaling.scaled(op()).benchmarks
    assert table.checked_at(10**8) == scaling.CHECKED


def scaling_run(threads, times, floor=1.0, op="square", family="f"):
    """Return a run with our times {size: milliseconds}; at every size the floor takes ``floor`` ms and moves 1 MB."""
    here = {"op": op, "family": family, "direction": "forward+backward", "bytes": 1_000_000}
    rows = [row(OURS, ms, 1.0, size=size, **here) for size, ms in times.items()]
    rows += [row(FLOOR, floor, 1.0, size=size, **here) for size in times]
    rows += [row(OURS, 7.0, 1.0, size=size, **here | {"direction": "backward"}) for size in times]
    return Report(f"bench {family}", "cpu", "fresh", MACHINE | {"threads": threads}, rows=rows)


def test_the_cost_page_shows_every_size_and_what_threads_gain(tmp_path):
    write_page([scaling_run(2, {100: 100, 1000: 1000}), scaling_run(1, {100: 175, 1000: 1850})], tmp_path / "cost.md")
    assert "| `square` | n | 100 | 1e+03 | 1.85 | 1.00 |" in (tmp_path / "cost.md").read_text()
    assert (tmp_path / "cost-f.png").stat().st_size > 5000
    write_page([scaling_run(2, {100: 100, 1000: 1000})], tmp_path / "alone.md")
    assert "| `square` | n | 100 | 1e+03 |  |  |" in (tmp_path / "alone.md").read_text()


def test_the_cost_page_takes_one_run_or_several_for_each_number_of_threads(tmp_path):
    """The page marks speedups that are too low, in two ways: memory gains no more, or memory gains more."""
    runs = [scaling_run(1, {10: 20.0}, 2.0), scaling_run(2, {10: 10.0}, 1.0)]
    runs += [scaling_run(1, {10: 2.0}, 1.8, "g", "g"), scaling_run(2, {10: 1.2}, 1.0, "g", "g")]
    runs += [scaling_run(1, {10: 1.0}, 1.8, "h", "h"), scaling_run(2, {10: 1.0}, 1.0, "h", "h")]
    runs += [scaling_run(2, {10: 1.0}, op="alone", family="h")]
    write_page(runs, tmp_path / "cost.md")
    text = (tmp_path / "cost.md").read_text()
    assert "| `square` | n | 10 | 2.00 | 2.00 |" in text
    assert "| `g` | n | 1.2 | 1.67\\* | 1.80 |" in text
    assert "| `h` | n | 1 | 1.00† | 1.80 |" in text
    assert "| `alone` | n | 1 |  |  |" in text
    assert "Of the 3 tables that move a megabyte or more 1 gain 1.8 or more. 1 marked \\* gain less" in text
    assert "1 marked † gain less than memory does." in text
    assert text.count("\n- ") == len(runs)


# ---------------------------------------------------------------- peers


def test_missing_peers_are_collected_once_each():
    table = benchmark(peers={"torch": "torch:square", "one": "no_such_package:f", "two": "no_such_package:g"})
    peers = Peers([table, table], None, quick=False)
    assert list(peers.of(table)) == ["torch"]
    assert peers.missing == dict.fromkeys(["one", "two"], "No module named 'no_such_package'")
    assert peers.modules == {"torch"}


def test_a_peer_that_its_package_lacks_is_an_error_before_anything_is_measured():
    with pytest.raises(AttributeError, match="squuare"):
        Peers([benchmark(peers={"typo": "torch:squuare"})], None, quick=False)


def test_the_peers_that_the_registry_names_exist_where_they_are_installed():
    Peers([table for info in TIMED.values() for table in info.benchmarks], None, quick=False)


def test_the_goals_on_a_gpu_are_beside_what_is_measured_there():
    for name, beside in goals.GOALS.items():
        for peer in beside:
            assert peer == FLOOR or any(peer in table.peers for table in TIMED[name].benchmarks), (name, peer)
    info = replace(op(peers={}), name="voxel_sum")
    assert measure_module._target(cell(info, 64), FLOOR, "forward+backward", "cuda") == pytest.approx(1 / 0.7)
    assert measure_module._target(cell(info, 8), FLOOR, "forward+backward", "cuda") is None
    assert measure_module._target(cell(info, 64), FLOOR, "forward+backward", "fresh") is None


def test_the_peers_can_be_chosen_and_quick_leaves_out_what_compiles():
    table = benchmark(peers={"torch.square": torch.square, "x * x, compiled": torch.square})
    assert list(Peers([table], None, quick=False).of(table)) == ["torch.square", "x * x, compiled"]
    assert list(Peers([table], None, quick=True).of(table)) == ["torch.square"]
    assert list(Peers([table], ["Compile"], quick=True).of(table)) == ["x * x, compiled"]
    assert list(Peers([table], [], quick=False).of(table)) == []


def test_the_tables_of_an_op_have_titles_of_their_own():
    for info in TIMED.values():
        titles = [table.title for table in info.benchmarks]
        assert len(set(titles)) == len(titles), f"{info.name}: two tables with one title, {titles}"


# ---------------------------------------------------------------- two runs


def row(contender, milliseconds, ratio, spread=0.02, rounds=50, **changed):
    given = {"op": "square", "family": "f", "table": "n", "size": 8, "direction": "forward", "contender": contender}
    measured = {"milliseconds": milliseconds, "spread": spread, "rounds": rounds, "ours_over_this": ratio}
    return Row(**given | measured | {"floors": 1.0, "bytes": 64, "gigabytes_per_second": 1.0} | changed)


def report(ours, **peers):
    spread = peers.pop("spread", 0.02)
    rows = [row(OURS, ours, 1.0, spread), *(row(name, ms, ours / ms, spread) for name, ms in peers.items())]
    return Report("bench", "cpu", "fresh", MACHINE, rows=rows)


def change(now, then, noise=0.15):
    (found,) = changes(now, then, noise)
    return found


def test_slower_means_in_ratio_to_the_peers():
    then = report(1.0, peer=2.0, floor=0.5)
    assert change(report(1.3, peer=2.0, floor=0.5), then).slower
    assert change(report(1.3, peer=2.0, floor=0.5), then).factor == pytest.approx(1.3)
    assert "square, n, 8, forward: 1.30× as long" in str(change(report(1.3, peer=2.0, floor=0.5), then))
    on_half_the_machine = change(report(2.0, peer=4.0, floor=1.0), then)
    assert not on_half_the_machine.slower and on_half_the_machine.factor == pytest.approx(1)
    assert change(report(0.5, peer=2.0, floor=0.5), then).faster


def test_one_peer_that_got_faster_is_not_us_getting_slower():
    then = report(1.0, a=2.0, b=2.0, floor=0.5)
    assert not change(report(1.0, a=0.2, b=2.0, floor=0.5), then).slower


def test_small_changes_and_noisy_ones_do_not_count():
    then = report(1.0, peer=2.0)
    assert not change(report(1.1, peer=2.0), then).slower
    assert change(report(1.1, peer=2.0), then, noise=0.05).slower
    assert not change(report(1.3, peer=2.0, spread=0.6), then).slower


def test_what_was_not_measured_both_times_is_not_compared():
    then = report(1.0, peer=2.0)
    other = Report("bench", "cpu", "fresh", MACHINE, rows=[replace(r, size=9) for r in then.rows])
    assert changes(other, then, 0.15) == []
    assert not change(report(9.0, another=2.0), then).slower


# ---------------------------------------------------------------- the command


@pytest.fixture
def tiny(monkeypatch):
    """Return the registry with one op, whose two tables have a size of each kind."""
    info = op(peers={"torch.square": torch.square, "absent": "no_such_package:f"})
    shapes = benchmark(sizes=((2, 4), (4, 4)), make=lambda s, device: make(math.prod(s), device), unit="shape")
    info = replace(info, benchmarks=[*info.benchmarks, shapes], native=torch.square)
    monkeypatch.setattr(run, "TIMED", {"square": info})
    monkeypatch.setattr(plan, "QUICK", BRIEF)
    monkeypatch.setattr(run.overhead, "CALLS", 2)
    monkeypatch.setattr(
        run.overhead, "interleave", lambda calls, _, *args, **kwargs: interleave(calls, 0, *args, **kwargs)
    )
    return info


def test_the_command_writes_what_it_measured(tiny, tmp_path, capsys):
    saved, table, plots = tmp_path / "a.json", tmp_path / "a.csv", tmp_path / "plots"
    assert run.main(["--quick", "--json", str(saved), "--csv", str(table), "--plots", str(plots)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("absent (No module named 'no_such_package')") == 1
    for part in ("× floor", "GB/s", "peak MiB", "threads", torch.backends.cpu.get_cpu_capability(), "4 × 4", "native"):
        assert part in printed, part

    result = json.loads(saved.read_text())
    assert result["command"].startswith("python -m benchmarks --quick")
    assert {"torch", "python", "custom_ops", "threads", "isa", "cpu", "cores", "load"} <= result["machine"].keys()
    assert result["missing"] == {"absent": "No module named 'no_such_package'"}
    assert list(result["overhead"]["ops"]["square"]) == [OURS, "native", "reference"]
    assert {(row["table"], label(row["size"])) for rows in result["rows"] for row in rows} == {
        ("n", "8"), ("n", "64"), ("shape", "2 × 4"), ("shape", "4 × 4")
    }  # fmt: skip
    assert len(saved.read_text().splitlines()) == 11 + 4 + 2  # the other fields, the sizes and the closing brackets
    lines = list(csv.DictReader(table.open()))
    assert len(lines) == sum(map(len, result["rows"]))
    assert lines[0]["machine.torch"] == torch.__version__ and lines[0]["contender"] == OURS
    assert sorted(path.name for path in plots.iterdir()) == ["square-n.png", "square-shape.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in plots.iterdir())


def test_the_command_compares_with_a_run_before(tiny, tmp_path, capsys):
    path = tmp_path / "then.json"
    assert run.main(["--quick", "--json", str(path)]) == 0
    assert read_json(path).rows[0].op == "square"
    arguments = ["--quick", "--against", str(path), "--noise", "100"]
    assert run.main(arguments) == 0
    assert "0 of 12 got slower against the peers" in capsys.readouterr().out

    then = json.loads(path.read_text())
    for row in itertools.chain(*then["rows"]):
        row["spread"] = 0.0
        row["ours_over_this"] /= 1 if row["contender"] == OURS else 1e6
    path.write_text(json.dumps(then))
    assert run.main(arguments) == 1
    assert "12 of 12 got slower" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--op", "square", "--family", "other"], "no op is both"),
        (["--against", "missing.json"], "--against: missing.json can't be read"),
        (["--op", "cube"], "invalid choice: 'cube'"),
        (["--sizes", "7x7"], "--sizes: no table has any of these"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--json", "/no/such/folder/a.json"], "--json, --csv, --plots: [Errno 2] No such file or directory"),
        (["--plots", "/dev/null/plots"], "--json, --csv, --plots: [Errno 20] Not a directory"),
        pytest.param(
            ["--device", "cuda"],
            "--device: there is no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_what_the_command_refuses(tiny, monkeypatch, capsys, arguments, said):
    other = replace(tiny, name="other")
    monkeypatch.setattr(run, "TIMED", {"square": tiny, "other": other})
    monkeypatch.setattr(TimedOp, "family", property(lambda info: info.name))
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("memory", "threads"), [("warm", 0), ("fresh", 3)])
def test_results_of_other_memory_or_threads_are_not_compared(tiny, tmp_path, capsys, memory, threads):
    path = tmp_path / "then.json"
    machine = MACHINE | {"threads": torch.get_num_threads() + threads}
    replace(report(1.0, peer=2.0), memory=memory, machine=machine).write_json(path)
    with pytest.raises(SystemExit):
        run.main(["--against", str(path)])
    assert f"was measured elsewhere: a CPU, {machine['threads']} threads" in " ".join(capsys.readouterr().err.split())


def test_a_wrong_answer_makes_the_command_fail_and_the_others_are_still_measured(tiny, monkeypatch, tmp_path, capsys):
    wrong = replace(tiny, name="wrong", function=lambda x: x * x + 1)
    monkeypatch.setattr(run, "TIMED", {"wrong": wrong, "square": tiny})
    path = tmp_path / "a.json"
    assert run.main(["--quick", "--json", str(path)]) == 1
    assert {row.op for row in read_json(path).rows} == {"square"}
    assert "not timed, our answer is wrong: wrong, n, 8: output" in capsys.readouterr().out


def test_the_command_can_scale_each_op_alone(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "SIZES", (10, 100))
    monkeypatch.setattr(scaling, "BRIEF", BRIEF)
    path, threads = tmp_path / "a.json", torch.get_num_threads()
    try:
        assert run.main(["--scaling", "--threads", "1", "--json", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    report = read_json(path)
    assert report.machine["threads"] == 1
    assert {(r.table, r.size, r.contender) for r in report.rows} == {
        ("n", size, contender) for size in (10, 100) for contender in (OURS, FLOOR)
    }


def test_warm_memory_is_a_process_whose_heap_keeps_what_is_freed(tiny, monkeypatch):
    started = []
    monkeypatch.setattr(run.subprocess, "call", lambda command, env: started.append((command, env)) or 5)
    assert run.main(["--memory", "warm"]) == 5
    ((command, env),) = started
    assert command[1:] == ["-m", "benchmarks", "--memory", "warm"]
    assert {name: env[name] for name in run.WARM} == run.WARM and env.keys() >= os.environ.keys()


def test_where_it_was_measured_and_whether_to_trust_it():
    assert describe(MACHINE, "cpu", "warm") == "a CPU, 2 threads, AVX2, warm memory"
    assert describe(MACHINE | {"device": "a GPU"}, "cuda", "fresh") == "a GPU (host: a CPU, 2 threads, AVX2)"
    assert trouble(MACHINE) == ""
    assert "the load was 3.9 on 4 cores" in trouble(MACHINE | {"load": 3.9})


def test_the_docs_show_each_op_beside_the_best_of_its_peers(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("generated", ROOT / "docs" / "generated.py")
    generated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generated)
    monkeypatch.setattr(generated, "RESULTS", tmp_path)
    monkeypatch.setattr(generated, "families", lambda: {"family": {"square": ["square"]}})
    result = report(1.0, peer=2.0)
    result.rows[0] = replace(result.rows[0], floors=1.5, peak_bytes=3 << 20)
    result.rows[1] = replace(result.rows[1], note="differs")
    result.overhead = {"library": {}, "ops": {"square": {OURS: 20.0, "native": 10.0}}}
    result.remarks = ["something to know"]
    result.write_json(tmp_path / "cpu.json")
    assert "| op |" in generated.fastest("family")
    assert "peer" not in generated.fastest("family")  # the peer's answer differs
    runs, text = generated.runs(), generated.speed()
    assert "1. a CPU, 2 threads, AVX2, fresh memory, torch 2.13.0: `bench`" in runs
    assert "- something to know" in runs
    assert "| 1 | `square`, first sample | 20.0 | native | 2.00 |" in generated.overhead()
    assert "## Family\n\n### `square`\n\nBy n; fresh memory, run 1." in text
    assert "| forward | ours, ms | ± IQR | × floor | GB/s | peak, MiB | ours / peer |" in text
    assert "| 8 | 1 | 2% | 1.50 | 1.0 | 3.0 | 0.50* |" in text
    assert "its answer differs" in text
    result.rows[1] = replace(result.rows[1], note="")
    result.write_json(tmp_path / "cpu.json")
    assert "| `square` | 8 n, forward | 1 ± 2% | peer | 2 ± 2% | 0.5 |" in generated.fastest("family")


def test_only_the_sizes_that_are_named_are_measured():
    plan = Plan([TIMED["lambda_loss"], TIMED["margin_ranking_loss"]])
    plan.keep(["16x1024", "10000"])
    assert {cell.size for cell in plan.cells} == {(16, 1024), 10000}
    assert plan.left == len(plan.cells)
