"""Every op beside its peers, in one process; ``python -m benchmarks``.

`plan` says what is measured and for how long, `measure` does one op at one size: `answers` are checked,
then `timing`, `floor` and `memory` measure; `report`, `plots` and `compare` are what comes out. On CUDA,
where time is taken by events and memory by the allocator's own peak, none of it has been run yet.
"""
