"""`TIMED`: a dictionary of every registered op, in order, with its tables of timings if it has any."""

from benchmarks.table import TimedOp, timed
from benchmarks.tables import activation, ranking, shaping, voxel
from custom_ops.registry import FUNCTIONS

_TABLES = activation.TABLES | ranking.TABLES | shaping.TABLES | voxel.TABLES
_NATIVE = activation.NATIVE | ranking.NATIVE | shaping.NATIVE | voxel.NATIVE

TIMED: dict[str, TimedOp] = {
    name: timed(info, _TABLES.get(name, []), _NATIVE.get(name)) for name, info in FUNCTIONS.items()
}
