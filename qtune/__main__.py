"""`python -m qtune`, and what launchers start: `accelerate launch -m qtune train RECIPE`."""

import sys

from qtune import launch
from qtune.cli import main

if __name__ == "__main__":
    sys.exit(launch.serve(main) if launch.is_rank() else main())
