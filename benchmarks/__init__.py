"""Benchmarks: run from the repository's root, `python -m benchmarks.against` and so on; README.md lists them."""

import sys

from .common import ROOT

sys.path.insert(0, str(ROOT / "python"))  # the tree's own build, whatever is installed
