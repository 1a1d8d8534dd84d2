"""Formats, methods and adapter starts on one's own model and data: `qtune compare`."""
