"""The model: sources, loading, adapters, attention, merging."""
