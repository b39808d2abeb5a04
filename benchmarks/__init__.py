"""Suites that measure the package; each is run as `python -m benchmarks.NAME`."""
