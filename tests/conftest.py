"""Triton kernels run on the CPU; and how pytest-xdist shares out the tests."""

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
# Nor torch: threads that wait for work sleep, for their spinning takes the cores from the other worker.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TOGETHER = re.compile(r".*test_(?:packaging|typing|distributed)\.py|.*test_battery\.py::test_cell\[[^-]*-[^-]*")
# Started first, so that no worker is left with one while the other has nothing to do.
LONG = re.compile(r"test_(?:packaging|typing|distributed)\.py|test_every_kernel_compiles|test_interruption|real_data")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.search(item.nodeid) is None)


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
