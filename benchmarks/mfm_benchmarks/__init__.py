"""Suites that measure mfm_lightning against what it must beat: `mfm benchmark NAME`."""
