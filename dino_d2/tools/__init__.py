"""Command-line tools: `python -m dino_d2.tools.NAME --help`."""
