"""Microbenchmarks: every variant is verified first, then timed beside its peers.

``python -m benchmarks.run --suite step --device cpu``
"""
