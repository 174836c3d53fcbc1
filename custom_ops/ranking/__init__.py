"""Ranking losses."""

from custom_ops.ranking import (
    lambdas,
    listwise,
    margin,
    metrics,
    neural_sort,
    pairwise,
    preference,
    smooth_rank,
    sorting,
)
from custom_ops.ranking.lambdas import *  # noqa: F403
from custom_ops.ranking.listwise import *  # noqa: F403
from custom_ops.ranking.margin import *  # noqa: F403
from custom_ops.ranking.metrics import *  # noqa: F403
from custom_ops.ranking.neural_sort import *  # noqa: F403
from custom_ops.ranking.pairwise import *  # noqa: F403
from custom_ops.ranking.preference import *  # noqa: F403
from custom_ops.ranking.smooth_rank import *  # noqa: F403
from custom_ops.ranking.sorting import *  # noqa: F403

__all__: list[str] = []
__all__ += lambdas.__all__
__all__ += listwise.__all__
__all__ += margin.__all__
__all__ += metrics.__all__
__all__ += neural_sort.__all__
__all__ += pairwise.__all__
__all__ += preference.__all__
__all__ += smooth_rank.__all__
__all__ += sorting.__all__
