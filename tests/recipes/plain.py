"""The plain loop as a module, for tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "plain_loop"))
import plain_loop

__all__ = ["plain_loop"]
