"""Benchmarks of every op beside its peers, in one process: ``python -m benchmarks``.

`plan` decides what is measured and for how long. `measure` runs one op at one size: it checks the answers (`answers`),
then takes the times (`timing`, `floor`) and the memory (`memory`). `report`, `plots` and `compare` present the results.
On CUDA, events take the time and the allocator reports the peak memory; none of that has run on a device yet.
"""
