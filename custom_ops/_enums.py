"""Enums of the options that ops take as integers.

C++ defines each enum again (``CUSTOM_OPS_ENUM``), with the same name and members, counted from 0; `custom_ops._native`
compares the two at import. The Triton kernels import these.
"""

from __future__ import annotations

from enum import IntEnum


class Choice(IntEnum):
    @classmethod
    def options(cls) -> dict[str, int]:
        """Return the members' values by the names that users write: "label_diff" for LABEL_DIFF.

        An op takes a plain integer, because converting a member would cost half a microsecond.
        """
        return {member.name.lower(): member.value for member in cls}


class Reduction(Choice):
    """The result of a list loss: the loss of each list, their mean over the lists that contribute, or their sum."""

    NONE, MEAN, SUM = range(3)


class LabelUse(Choice):
    """The way in which a loss uses labels; see `custom_ops.ranking._inputs`."""

    ORDER, DIFFERENCE, EXPONENTIAL, VALUE = range(4)


class PairFunction(Choice):
    """The function of a pair's difference in ``pairwise``."""

    LOGISTIC, SOFT_ZERO_ONE, EXPONENTIAL = range(3)


class PairWeighting(Choice):
    """The weight of a pair in ``lambda_pairs``."""

    RANKNET, LAMBDARANK, NDCG1, NDCG2, NDCG2PP, LABEL_DIFF = range(6)


class TopPairs(Choice):
    """The pairs that count in ``lambda_pairs``: one item in the top k, both, or all that change the metric at k."""

    OR, AND, METRIC = range(3)


class PairNormalization(Choice):
    """The number by which ``lambda_pairs`` divides: 1, that of the pairs, or S / log2(1 + S) for the sum S of all
    lambdas.
    """

    NONE, PAIRS, LAMBDAS = range(3)


class Ties(Choice):
    """The order of items with equal labels in ``list_mle``."""

    INDEX, SCORE, BRESLOW = range(3)


class PositionWeights(Choice):
    """The weight of a position in ``list_mle``."""

    UNIFORM, EXPONENTIAL, DISCOUNT = range(3)


class RankMetric(Choice):
    """The metric of ``rank_metric``."""

    PRECISION, RECALL, F1, HIT_RATE, R_PRECISION, RECIPROCAL_RANK, AVERAGE_PRECISION, DCG, NDCG, ERR, AUC = range(11)


class TiedScores(Choice):
    """The places of items with equal scores in ``rank_metric``."""

    AVERAGE, INDEX, TOGETHER = range(3)


class SmoothMetric(Choice):
    """The metric of ``smooth_rank``."""

    NDCG, NDCG_LINEAR, MRR, AVERAGE_PRECISION = range(4)


class GroupValue(Choice):
    """An item's result in ``group_reduce``: its group's sum, its group's mean, or its own value minus that mean."""

    SUM, MEAN, CENTRED = range(3)


class PreferenceLoss(Choice):
    """The function of a pair's difference in ``preference``."""

    LOGISTIC, HINGE, SQUARED, DIVERGENCE, SIGMOID, BLEND = range(6)


class SurrogateShape(Choice):
    """The smooth step whose derivative ``surrogate_step`` has."""

    SIGMOID, ATAN, TRIANGLE, BOXCAR = range(4)
