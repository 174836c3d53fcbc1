"""Triton kernels run on the CPU; which tests wait for ``make test-full``; and how pytest-xdist shares out the tests."""

import gc
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
if os.environ["TRITON_INTERPRET"] == "1":
    collect_ignore = ["ptx"]  # run by test_ptx.py
# Nor torch: threads that wait for work sleep, for their spinning takes the cores from the other worker.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Inductor would start processes to compile in, which import torch and then have a kernel or two each.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

TOGETHER = re.compile(r".*test_(?:packaging|typing|distributed|dtensor)\.py|.*test_battery\.py::test_cell\[[^-]*-[^-]*")
# Started first, so that no worker is left with one while the other has nothing to do.
LONG = re.compile(r"test_(?:packaging|typing|distributed|dtensor)\.py|test_every_kernel_compiles|real_data")
FULL_ONLY = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all tests, and all that each of them does: `make test-full`")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether this is ``make test-full``."""
    return bool(request.config.getoption("full"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.search(item.nodeid) is None)
    left_out = [] if config.getoption("full") else [item for item in items if item.get_closest_marker("full")]
    config.stash[FULL_ONLY] = len(left_out)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_collection_finish() -> None:
    """What is there before the first test stays: Python's collector needn't look through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["full_only"] = session.config.stash.get(FULL_ONLY, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Each worker has left out the same tests."""
    node.config.stash[FULL_ONLY] = getattr(node, "workeroutput", {}).get("full_only", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Says what was not run and why, each reason once."""
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
    """One worker takes all tests that share what is made: of one of those files, or of an op on a backend."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            together = TOGETHER.match(nodeid)
            return together.group() if together else nodeid

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.fixture(params=["cpp", "triton"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """The test runs on the C++ kernels, then on the Triton kernels."""
    from custom_ops.verify._backends import backend

    with backend(request.param):
        yield
