"""Imported first: where pagedkv is on a machine on which it is not installed."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("pagedkv") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
