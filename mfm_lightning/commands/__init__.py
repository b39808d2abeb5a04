"""The command `mfm` and its tools, one file a command."""
