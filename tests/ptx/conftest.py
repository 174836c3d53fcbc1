"""These tests compile Triton's kernels instead of interpreting them."""

import pytest


@pytest.fixture(autouse=True)
def quicker_interpreter() -> None:
    pass
