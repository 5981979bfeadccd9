"""Where files that can be fetched or made again are kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """$STEPWIRE_CACHE, else ~/.cache/stepwire."""
    environ = os.environ if environ is None else environ
    if named := environ.get("STEPWIRE_CACHE"):
        return Path(named).expanduser()
    return Path("~/.cache").expanduser() / "stepwire"
