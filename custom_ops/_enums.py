"""The choices that ops take as integers.

Each enum here is defined once more in C++ (``CUSTOM_OPS_ENUM``), with the same name and the same names of its members,
both counted from 0: `custom_ops._native` compares them at import. The Triton kernels import these.
"""

from __future__ import annotations

from enum import IntEnum


class Choice(IntEnum):
    @classmethod
    def options(cls) -> dict[str, int]:
        """The members by the names that users give: "label_diff" for LABEL_DIFF."""
        return {member.name.lower(): member for member in cls}


class Reduction(Choice):
    """What a list loss gives: the loss of each list, their mean over those that contribute, or their sum."""

    NONE, MEAN, SUM = range(3)


class LabelUse(Choice):
    """What a loss makes of labels: see `custom_ops.ranking._inputs`."""

    ORDER, DIFFERENCE, EXPONENTIAL, VALUE = range(4)


class PairFunction(Choice):
    """The function of a pair's difference in ``pairwise``."""

    LOGISTIC, SOFT_ZERO_ONE, EXPONENTIAL = range(3)


class PairWeighting(Choice):
    """The weight of a pair in ``lambda_pairs``."""

    RANKNET, LAMBDARANK, NDCG1, NDCG2, NDCG2PP, LABEL_DIFF = range(6)


class Ties(Choice):
    """The order of items with equal labels in ``list_mle``."""

    INDEX, SCORE, BRESLOW = range(3)


class PositionWeights(Choice):
    """The weight of a place in ``list_mle``."""

    UNIFORM, EXPONENTIAL, DISCOUNT = range(3)


class SmoothMetric(Choice):
    """The metric of ``smooth_rank``."""

    NDCG, NDCG_LINEAR, MRR, AVERAGE_PRECISION = range(4)


class GroupValue(Choice):
    """What ``group_reduce`` gives an item: its group's sum, its group's mean, or its own value less that mean."""

    SUM, MEAN, CENTRED = range(3)


class PreferenceLoss(Choice):
    """The function of a pair's difference in ``preference``."""

    LOGISTIC, HINGE, SQUARED, DIVERGENCE = range(4)


class SurrogateShape(Choice):
    """The smooth step as which ``surrogate_step`` is differentiated."""

    SIGMOID, ATAN, TRIANGLE, BOXCAR = range(4)
