"""Ranking losses."""

from custom_ops.ranking import margin
from custom_ops.ranking.margin import *  # noqa: F403

__all__: list[str] = []
__all__ += margin.__all__
