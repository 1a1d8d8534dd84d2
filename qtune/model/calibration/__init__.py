"""Calibration: what each layer of a model is given, block by block, and codes that suit it."""
