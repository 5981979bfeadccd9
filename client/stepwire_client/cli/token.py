"""`stepwire token`: bearer tokens for the clients of a scheduler."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from pathlib import Path
from typing import Literal

from stepwire_client.cli.screen import note
from stepwire_client.errors import SettingError

NUM_RANDOM_BYTES = 32


def token(action: Literal["new"], tenant: str, /, *, tokens_file: Path | None = None) -> None:
    """Make a token: shown once, while the scheduler's file of tokens keeps only its hash.

    Parameters
    ----------
    action
        new
    tenant
        Whose requests those with this token are.
    tokens_file
        The scheduler's file, which gets the token's line; without it the line is printed.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", tenant):
        raise SettingError(
            f"{tenant!r} cannot be a tenant: use up to 64 letters, digits, dots, dashes and "
            "underscores"
        )
    made = f"stepwire_{secrets.token_urlsafe(NUM_RANDOM_BYTES)}"
    line = f"{tenant} sha256:{hashlib.sha256(made.encode()).hexdigest()}"
    if tokens_file is not None:
        _append(tokens_file, line)
    note("the token, for the client (STEPWIRE_TOKEN); it is not shown again:")
    print(made, flush=True)
    if tokens_file is None:
        note("its line, for the scheduler's --auth-tokens-file:")
        print(line, flush=True)


def _append(path: Path, line: str) -> None:
    """A new file is for its owner only."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "rb+") as opened:
            content = opened.read()
            start = "\n" if content and not content.endswith(b"\n") else ""
            opened.write(f"{start}{line}\n".encode())
    except OSError as error:
        raise SettingError(f"--tokens-file {path}: {error.strerror}") from None
