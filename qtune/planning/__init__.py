"""Which form of a model fits a memory, from configurations alone: `qtune plan`."""
