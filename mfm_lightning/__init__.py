"""mfm-lightning: Meta Flow Maps (ICML 2026, arXiv 2601.14430) for scalable reward alignment."""

__version__ = "0.1.0"
