"""Property tests: hypothesis compares random calls of every op and metric with its float64 reference. Options and
indices come in any form that means the same, such as numpy scalars (tests/forms.py).

``make test`` makes the same few calls each time (tests/test_properties.py). ``make fuzz`` makes new ones for as long as
it is told to::

    python tests/fuzz.py --seconds 600 --op relu

A failing call is shrunk and printed, that of an op as a script that repeats it.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from forms import InOtherForms
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from metric_calls import METRICS
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import custom_ops  # noqa: F401 (registers the ops)
from custom_ops.registry import FUNCTIONS, OpInfo
from custom_ops.verify import BACKENDS, backend, check, random_sample, script
from custom_ops.verify._fuzz import Choose

FUZZED = {**FUNCTIONS, **METRICS}


def property_of(info: OpInfo, examples: int, interpreted: bool = False, **options: Any) -> Callable[[], None]:
    """Return a test with ``examples`` calls of the op; ``interpreted`` leaves out subnormals of bfloat16, which
    Triton's interpreter gets wrong.
    """
    info = replace(info, samples=functools.cache(info.samples))

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        **options,
    )
    @given(data=st.data())
    def holds(data: st.DataObject) -> None:
        call_at_random(info, lambda choices: choices[data.draw(st.integers(0, len(choices) - 1))], interpreted)

    return holds


def call_at_random(info: OpInfo, choose: Choose, interpreted: bool = False) -> None:
    """Make a call of the op, and raise ``AssertionError`` if it doesn't equal its reference."""
    sample = random_sample(info, choose)
    if interpreted and any(_tiny(a) for a in (*sample.args, *sample.kwargs.values())):
        return
    function = InOtherForms(info.function, choose)
    try:
        check(replace(info, function=function), sample)
    except Exception as error:
        repeated = script(info, sample) if info.name in FUNCTIONS else ""
        raise AssertionError(f"{type(error).__name__}: {error}\n# given {function.given}\n\n{repeated}") from error


def _tiny(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bfloat16:
        return False
    return bool(((value != 0) & (value.abs() < 1e-35)).any())


def misses(info: OpInfo, calls: range, start: int, interpreted: bool = False) -> Iterator[str]:
    """Yield the failures among these calls of the op."""
    kept = replace(info, samples=functools.cache(info.samples))
    for number in calls:
        try:
            call_at_random(kept, random.Random(f"{info.name} {start} {number}").choice, interpreted)
        except AssertionError as error:
            yield f"call {number}: {error}"


def make_calls(ops: list[str], count: int, start: int, interpreted: bool, console: Console) -> int:
    found = 0
    for name in ops:
        begin, before = time.process_time(), found
        for text in misses(FUZZED[name], range(count), start, interpreted):
            print(f"# {name}, {text}", flush=True)
            found += 1
        seconds = time.process_time() - begin
        console.print(f"{name}: {count} calls, {found - before} failures, {seconds:.1f} s", highlight=False)
    console.print(f"{count} calls of each of {len(ops)} ops, {found} failures")
    return 1 if found else 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="how long, in all; 300 by default")
    parser.add_argument("--calls", type=int, help="how many of each op, instead")
    parser.add_argument("--op", action="append", choices=FUZZED, help="only this op (may be repeated)")
    parser.add_argument("--backend", choices=BACKENDS, default="cpp")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="repeats a run")
    options = parser.parse_args(argv)
    if options.backend == "triton":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it at import
    ops = options.op or list(FUZZED)
    failures: dict[str, str] = {}
    console = Console(stderr=True)
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
    begin, batch, calls = time.monotonic(), 25, 0
    console.print(f"--seed {options.seed}")
    if options.calls is not None:
        with backend(options.backend):
            return make_calls(ops, options.calls, options.seed, options.backend == "triton", console)
    with backend(options.backend), Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=options.seconds)
        while time.monotonic() - begin < options.seconds and len(failures) < len(ops):
            for name in ops:
                elapsed = time.monotonic() - begin
                if name in failures or elapsed > options.seconds:
                    continue
                bar.update(task, completed=elapsed, description=f"{calls} calls, {len(failures)} failures: {name}")
                try:
                    seed(options.seed + calls)(property_of(FUZZED[name], batch, options.backend == "triton"))()
                except AssertionError as error:
                    failures[name] = str(error)
                    bar.console.print(f"[bold red]{name}[/]")
                calls += batch
    for name, text in failures.items():
        print(f"# {name}: {text}")
    console.print(f"{calls} calls of {len(ops)} ops, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
