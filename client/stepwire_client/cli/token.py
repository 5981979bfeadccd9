"""`stepwire token`: bearer tokens for the clients of a scheduler."""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Literal

from stepwire_client.cli.screen import note
from stepwire_client.errors import SettingError

NUM_RANDOM_BYTES = 32


def token(action: Literal["new"], tenant: str, /) -> None:
    """Make a token: shown once, while the scheduler's file of tokens keeps only its hash.

    Parameters
    ----------
    action
        new
    tenant
        Whose requests those with this token are.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", tenant):
        raise SettingError(
            f"{tenant!r} cannot be a tenant: use up to 64 letters, digits, dots, dashes and "
            "underscores"
        )
    made = f"stepwire_{secrets.token_urlsafe(NUM_RANDOM_BYTES)}"
    note("the token, for the client (STEPWIRE_TOKEN); it is not shown again:")
    print(made, flush=True)
    note("its line, for the scheduler's --auth-tokens-file:")
    print(f"{tenant} sha256:{hashlib.sha256(made.encode()).hexdigest()}", flush=True)
