"""Triton kernels run on the CPU; and how pytest-xdist shares out the tests."""

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

# Started first, so that no worker is left with one while the other has nothing to do.
LONG = re.compile(r"test_packaging\.py|test_every_kernel_compiles|test_interruption|test_.*real_data|test_typing\.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.search(item.nodeid) is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One worker takes all tests of the built package, of typing, or of an op on a backend: they share what is made."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            together = re.match(r".*test_(?:packaging|typing)\.py|.*test_battery\.py::test_cell\[[^-]*-[^-]*", nodeid)
            return together.group() if together else nodeid

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.fixture(params=["cpp", "triton"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """The test runs on the C++ kernels, then on the Triton kernels."""
    from custom_ops.verify._backends import backend

    with backend(request.param):
        yield
