"""Command lines: flags in, library call, files out."""
