"""Conversations in: sources, checks, templates and masks, lint, batches and their order."""
