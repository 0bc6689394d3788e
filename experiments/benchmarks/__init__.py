"""Benchmark suites: each checks correctness first, then measures ratios within one run."""
