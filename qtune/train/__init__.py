"""Training: the loop, what it optimizes, what it saves."""
