"""Benchmarks: `make bench`. Each module measures one part, and has `run()`, which gives a `Report`.

Ratios are of medians of interleaved runs in one session; absolute seconds say little on a shared machine. No test
asserts them.
"""
