"""The tests of single launchers run on the emulator, with whole tensors in many programs."""

from collections.abc import Iterator

import pytest
from test_triton import (  # noqa: F401 (tests, which run here too)
    test_activation_and_mask,
    test_bias_of_a_channel,
    test_corrupted_boundaries_reach_no_other_memory,
    test_margin_in_double,
    test_margin_ranking,
    test_maximum_with_nan_ties_and_infinities,
    test_no_segment_reaches_another,
    test_relu_dropout,
    test_relu_keeps_nan_and_no_zero,
    test_segments,
    test_segments_of_their_own_geometry_and_pooled_points,
    test_sizes_of_one_and_of_64_bits,
    test_squared_relu,
    test_voxel_bounds,
    test_voxel_bounds_of_unsorted_ranks,
    test_voxel_index,
    test_voxel_sort,
)

from custom_ops.verify.ptx import emulate

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    with emulate():
        yield
