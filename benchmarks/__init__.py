"""Benchmarks, each with a peer or a physical limit in the same run: ``python -m benchmarks`` (docs/benchmarks.md)."""
