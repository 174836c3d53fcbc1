"""Settings of all tests: Triton kernels run on the CPU, some tests run in ``make test-full`` only, and workers share
the rest.
"""

import gc
import itertools
import os
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from interpreter import patched_once

os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is imported
if os.environ["TRITON_INTERPRET"] == "1":
    collect_ignore = ["ptx"]  # test_ptx.py runs these tests in other processes
# This must be set before torch is imported. Idle threads then sleep instead of spinning, which would take the cores
# from the other worker.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Inductor would start compile processes, and each would import torch to compile a kernel or two.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Inductor would compile a program per instruction set with each new cache, to see whether the compiler knows it.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

# The cases of one test go to one worker, and so do these files and the cells of an op on a backend: they share setup.
TOGETHER = re.compile(r".*test_(?:packaging|typing|distributed|dtensor)\.py|.*::test_cell\[[^-]*-[^-]*|[^\[]*")
# Long tests start first, so no worker is left with one of them while the other is idle.
LONG = re.compile(r"test_(?:packaging|typing|distributed|dtensor)\.py|test_every_kernel_compiles|real_data")
FULL_ONLY = pytest.StashKey[int]()
STARTED = itertools.count()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all tests, and all that each of them does: `make test-full`")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Return whether this is ``make test-full``."""
    return bool(request.config.getoption("full"))


def beyond_the_sample(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """Yield the cases of tests marked ``sampled(n)`` that aren't among one in n, the same on every machine."""
    cases = defaultdict(list)
    for item in items:
        if mark := item.get_closest_marker("sampled"):
            cases[item.nodeid.partition("[")[0], mark.args[0]].append(item)
    for (_, n), found in cases.items():
        mixed = sorted(found, key=lambda item: zlib.crc32(item.nodeid.encode()))
        yield from mixed[-(-len(mixed) // n) :]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.search(item.nodeid) is None)
    left_out: set[pytest.Item] = set()
    if not config.getoption("full"):
        left_out = {item for item in items if item.get_closest_marker("full")} | {*beyond_the_sample(items)}
    config.stash[FULL_ONLY] = len(left_out)
    if left_out:
        config.hook.pytest_deselected(items=[*left_out])
        items[:] = [item for item in items if item not in left_out]


def pytest_runtest_setup() -> None:
    """Freeze the objects that exist before a test, so that Python's garbage collector needn't scan them in it. Now and
    then what the tests before have left is collected.
    """
    if next(STARTED) % 250 == 0:
        gc.unfreeze()
        gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["full_only"] = session.config.stash.get(FULL_ONLY, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the count of deselected tests from any worker, as it is the same on each."""
    node.config.stash[FULL_ONLY] = getattr(node, "workeroutput", {}).get("full_only", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print what was not run and why, each reason once."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])
    )
    if left_out := config.stash.get(FULL_ONLY, 0):
        reasons["only in `make test-full`"] = left_out
    if reasons:
        terminalreporter.section("not run")
        for reason, tests in reasons.most_common():
            terminalreporter.write_line(f"{tests:6} {reason}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute by ``TOGETHER``. The scheduler's own work grows with the number of scopes."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            together = TOGETHER.match(nodeid)
            assert together  # it matches any text
            return together.group()

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def quicker_interpreter() -> Iterator[None]:
    """Triton interprets without the work that it repeats, within each test."""
    with patched_once():
        yield


@pytest.fixture(params=["cpp", "triton"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the test on the C++ kernels, then on the Triton kernels."""
    from custom_ops.verify._backends import backend

    with backend(request.param):
        yield
