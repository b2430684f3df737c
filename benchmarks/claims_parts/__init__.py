"""Parts of `python benchmarks/claims.py`."""
