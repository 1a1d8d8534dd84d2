"""Engines that load an export, behind the face of a transformers model."""
