"""`stepwire pull`: fetch a model."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from stepwire_client import models
from stepwire_client.cli.screen import PhaseProgress


def pull(name: str, /, *, verify: Annotated[bool, Parameter(negative=())] = False) -> None:
    """Fetch a known model into the cache, unless it is there; print its folder.

    Parameters
    ----------
    name
        smollm2-135m is known.
    verify
        Read a cached model again and fetch it anew where its sha256 is wrong.
    """
    with PhaseProgress() as progress:
        folder = models.pull(name, progress.update, verify=verify)
    print(folder)
