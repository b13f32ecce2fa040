"""A small byte-level GPT and the runs that ``lhopt demo`` and ``lhopt train`` do with it."""
