"""Benchmarks: each prints its figure beside a reference in the same run."""
