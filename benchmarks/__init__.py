"""Benchmarks, each with a peer or a physical limit in the same run (docs/explanation/benchmarks.md)."""
