"""Puts the helpers beside the tests, which are no package, where tests find them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
