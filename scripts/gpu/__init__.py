"""The parts of scripts/gpu_suite.py; what they share with scripts/tune.py."""
