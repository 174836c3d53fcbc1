"""Ranking losses."""

from custom_ops.ranking.catalogue import LinearCrossEntropy, LinearLogProb, linear_cross_entropy, linear_log_prob
from custom_ops.ranking.contrastive import (
    InfoNCELoss,
    SigmoidContrastiveLoss,
    info_nce_loss,
    sigmoid_contrastive_loss,
)
from custom_ops.ranking.lambdas import LambdaLoss, lambda_loss
from custom_ops.ranking.listwise import (
    CoSENTLoss,
    ListMLELoss,
    ListNetLoss,
    SoftmaxLoss,
    UniqueSoftmaxLoss,
    cosent_loss,
    list_mle_loss,
    list_net_loss,
    softmax_loss,
    unique_softmax_loss,
)
from custom_ops.ranking.margin import MarginRankingLoss, MarginRankingLossFunction, margin_ranking_loss
from custom_ops.ranking.metrics import (
    auc,
    average_precision,
    dcg,
    err,
    f1_score,
    hit_rate,
    mrr,
    ndcg,
    precision,
    r_precision,
    recall,
)
from custom_ops.ranking.neural_sort import NeuralSortNDCGLoss, neural_sort_ndcg_loss
from custom_ops.ranking.pairwise import (
    PairwiseExponentialLoss,
    PairwiseHingeLoss,
    PairwiseLogisticLoss,
    PairwiseMSELoss,
    PairwiseSoftZeroOneLoss,
    pairwise_exponential_loss,
    pairwise_hinge_loss,
    pairwise_logistic_loss,
    pairwise_mse_loss,
    pairwise_soft_zero_one_loss,
)
from custom_ops.ranking.preference import BPRLoss, BradleyTerryLoss, DPOLoss, bpr_loss, bradley_terry_loss, dpo_loss
from custom_ops.ranking.smooth_rank import (
    ApproxMRRLoss,
    ApproxNDCGLoss,
    SmoothAPLoss,
    approx_mrr_loss,
    approx_ndcg_loss,
    smooth_ap_loss,
)
from custom_ops.ranking.sorting import SpearmanLoss, soft_rank, soft_sort, spearman_loss

# The names are spelled out, as mypy can't follow `__all__ += module.__all__` through two levels and would see none of
# them.
__all__ = [
    "ApproxMRRLoss",
    "ApproxNDCGLoss",
    "BPRLoss",
    "BradleyTerryLoss",
    "CoSENTLoss",
    "DPOLoss",
    "InfoNCELoss",
    "LambdaLoss",
    "LinearCrossEntropy",
    "LinearLogProb",
    "ListMLELoss",
    "ListNetLoss",
    "MarginRankingLoss",
    "MarginRankingLossFunction",
    "NeuralSortNDCGLoss",
    "PairwiseExponentialLoss",
    "PairwiseHingeLoss",
    "PairwiseLogisticLoss",
    "PairwiseMSELoss",
    "PairwiseSoftZeroOneLoss",
    "SigmoidContrastiveLoss",
    "SmoothAPLoss",
    "SoftmaxLoss",
    "SpearmanLoss",
    "UniqueSoftmaxLoss",
    "approx_mrr_loss",
    "approx_ndcg_loss",
    "auc",
    "average_precision",
    "bpr_loss",
    "bradley_terry_loss",
    "cosent_loss",
    "dcg",
    "dpo_loss",
    "err",
    "f1_score",
    "hit_rate",
    "info_nce_loss",
    "lambda_loss",
    "linear_cross_entropy",
    "linear_log_prob",
    "list_mle_loss",
    "list_net_loss",
    "margin_ranking_loss",
    "mrr",
    "ndcg",
    "neural_sort_ndcg_loss",
    "pairwise_exponential_loss",
    "pairwise_hinge_loss",
    "pairwise_logistic_loss",
    "pairwise_mse_loss",
    "pairwise_soft_zero_one_loss",
    "precision",
    "r_precision",
    "recall",
    "sigmoid_contrastive_loss",
    "smooth_ap_loss",
    "soft_rank",
    "soft_sort",
    "softmax_loss",
    "spearman_loss",
    "unique_softmax_loss",
]

MarginRanking = MarginRankingLossFunction  # the former name
