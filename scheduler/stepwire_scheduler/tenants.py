"""Who calls: tenants, their tokens in a file, and the check of each call.

The file has one token a line, and a tenant may have several, so that tokens can be replaced one
after the other:

    # TENANT  sha256:HEX OF THE TOKEN  [max_requests=N] [min_priority=N]
    alice     sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import structlog

from stepwire_scheduler.config import SchedulerConfig
from stepwire_scheduler.errors import ConfigError, UnauthenticatedError
from stepwire_scheduler.validation import MAX_PRIORITY

log = structlog.get_logger(__name__)

FLAG = "--auth-tokens-file"
RELOAD_INTERVAL_S = 1.0
"""The file is looked at for changes no more often than this."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_SCHEME = "bearer "


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Whose request it is, and what it may use."""

    name: str
    """"" for everybody where there are no tokens."""
    max_requests: int | None = None
    """Requests that may be queued or running at once; None: as many as the queue takes."""
    min_priority: int = -MAX_PRIORITY
    """Requests that ask for a smaller priority, which would run earlier, get this one."""


EVERYBODY = Tenant(name="")
_current: ContextVar[Tenant] = ContextVar("stepwire_tenant", default=EVERYBODY)


def current_tenant() -> Tenant:
    """Of the call that the running task answers."""
    return _current.get()


def set_current_tenant(tenant: Tenant) -> None:
    """Say whose call the running task answers."""
    _current.set(tenant)


class TokensFile:
    """Tenants by the digest of their tokens; follows the file as it changes."""

    def __init__(
        self,
        path: str,
        *,
        default_max_requests: int,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """default_max_requests: of tenants whose lines give none. Raises ConfigError."""
        self._path = path
        self._default_max_requests = default_max_requests
        self._clock_s = clock_s
        self._signature = self._stat()
        self._tenants = self._read()
        self._checked_s = clock_s()

    def find(self, token: str) -> Tenant | None:
        """Whose token it is.

        Found by its digest: how long that takes tells about digests, which say nothing about
        tokens, so there is nothing to compare in constant time.
        """
        self._follow()
        return self._tenants.get(digest_of(token))

    def _follow(self) -> None:
        """Read the file again where it changed; a faulty one changes nothing."""
        now = self._clock_s()
        if now - self._checked_s < RELOAD_INTERVAL_S:
            return
        self._checked_s = now
        try:
            signature = self._stat()
            if signature == self._signature:
                return
            self._signature = signature
            self._tenants = self._read()
        except ConfigError as error:
            log.error("tokens are still those from before", cause=error.message)
        else:
            log.info("tokens read again", num_tokens=len(self._tenants))

    def _stat(self) -> tuple[int, int, int]:
        try:
            stat = os.stat(self._path)
        except OSError as error:
            raise ConfigError(f"{FLAG} {self._path} cannot be read: {error.strerror}") from None
        return stat.st_mtime_ns, stat.st_ino, stat.st_size

    def _read(self) -> dict[bytes, Tenant]:
        try:
            if os.stat(self._path).st_mode & 0o022:
                log.warning("tokens file can be written by other users", flag=FLAG, fix="chmod 600")
            text = Path(self._path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{FLAG} {self._path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{FLAG} {self._path} is not a text file") from None
        try:
            return parse_tokens(text, default_max_requests=self._default_max_requests)
        except ValueError as error:
            raise ConfigError(f"{FLAG} {self._path}: {error}") from None


def read_tokens(config: SchedulerConfig) -> TokensFile | None:
    """The file of --auth-tokens-file; None where none is named. Raises ConfigError."""
    if config.auth_tokens_file is None:
        return None
    return TokensFile(config.auth_tokens_file, default_max_requests=config.max_requests_per_tenant)


def digest_of(token: str) -> bytes:
    """What the file keeps of a token; tokens are random, so a plain hash cannot be guessed."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def parse_tokens(text: str, *, default_max_requests: int) -> dict[bytes, Tenant]:
    """Tenants by digest; raises ValueError that names the line and never what it holds."""
    tenants: dict[bytes, Tenant] = {}
    by_name: dict[str, Tenant] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        digest = _DIGEST.fullmatch(words[1]) if len(words) > 1 else None
        if digest is None or not _NAME.fullmatch(words[0]):
            raise ValueError(
                f"line {number} is not TENANT sha256:HEX, as `stepwire token new TENANT` prints it"
            )
        tenant = _with_options(words[0], words[2:], number, default_max_requests)
        if by_name.setdefault(tenant.name, tenant) != tenant:
            raise ValueError(f"line {number} gives its tenant other limits than a line before")
        key = bytes.fromhex(digest[1])
        if tenants.setdefault(key, tenant) != tenant:
            raise ValueError(f"line {number} has the token of another tenant")
    if not tenants:
        raise ValueError("it has no token: add what `stepwire token new TENANT` prints")
    return tenants


def _with_options(
    name: str, words: Iterable[str], number: int, default_max_requests: int
) -> Tenant:
    options = {"max_requests": default_max_requests, "min_priority": -MAX_PRIORITY}
    bounds = {"max_requests": (1, 1_000_000), "min_priority": (-MAX_PRIORITY, MAX_PRIORITY)}
    for word in words:
        option, _, value = word.partition("=")
        if option not in options or not re.fullmatch(r"-?[0-9]{1,7}", value):
            raise ValueError(f"line {number}: options are max_requests=N and min_priority=N")
        low, high = bounds[option]
        if not low <= int(value) <= high:
            raise ValueError(f"line {number}: {option} must be between {low} and {high}")
        options[option] = int(value)
    return Tenant(name=name, **options)


class Authenticator:
    """Names the tenant of each call."""

    def __init__(
        self, tokens: TokensFile | None = None, on_refused: Callable[[str], None] | None = None
    ) -> None:
        """Without tokens everybody may call. on_refused is told the reason of each refusal."""
        self._tokens = tokens
        self._on_refused = on_refused or (lambda reason: None)

    def authenticate(self, metadata: Iterable[tuple[str, str | bytes]], peer: str) -> Tenant:
        """The tenant whose token the metadata hold.

        peer: as gRPC names it. Whoever could open the socket of --local-socket is let in by the
        file's permissions. Raises UnauthenticatedError, the same for every cause.
        """
        if self._tokens is None or peer.startswith("unix:"):
            return EVERYBODY
        values = [value for key, value in metadata if key == "authorization"]
        if len(values) == 1 and isinstance(values[0], str):
            scheme, token = values[0][: len(_SCHEME)], values[0][len(_SCHEME) :]
            if scheme.lower() == _SCHEME and (tenant := self._tokens.find(token)) is not None:
                return tenant
        self._on_refused(UnauthenticatedError.reason)
        log.info("call refused for want of a valid token", peer=peer)
        raise UnauthenticatedError(
            "the call needs a valid token, as metadata: authorization: Bearer TOKEN"
        )
