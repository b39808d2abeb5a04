"""mfm-lightning: Meta Flow Maps (ICML 2026, arXiv 2601.14430) for scalable reward alignment."""

from mfm_lightning._version import __version__ as __version__
