"""Where hfpatch keeps files between runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """Checkpoints, drawn samples, compiled kernels: HFPATCH_CACHE, else `hfpatch` in the platform's cache folder."""
    if own := os.environ.get("HFPATCH_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "hfpatch"
