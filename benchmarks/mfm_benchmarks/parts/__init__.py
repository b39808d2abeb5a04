"""Experiments that suites are put together from; each has cells and the blocks of their report."""
