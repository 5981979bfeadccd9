"""What can go wrong, seen from a client.

StepwireError
├── RpcError                      a scheduler answered a call with an error
│   ├── InvalidArgumentError      the request breaks a rule; field_violations says which
│   ├── AlreadyExistsError        the request id is in use
│   ├── ResourceExhaustedError    queue or quota full; retry_after_s says when to come back
│   ├── UnavailableError          no server, still loading, or draining; retry_after_s
│   ├── DeadlineExceededError     the call's time is up
│   ├── RequestCancelledError     the caller ended the call
│   ├── AuthenticationError       the server wants a token, or another one
│   ├── TlsError                  client and server do not trust each other's certificates
│   ├── AbortedError              the server gave the call up, or another call has taken over
│   ├── NotRetainedError          the server no longer has what was to be resumed
│   └── ServerError               anything else: a fault of the server
├── ModelError                    a model cannot be had
│   ├── UnknownModelError         neither a known name nor a path
│   ├── DownloadError             the package could not be fetched
│   └── ChecksumError             the fetched file is not the expected one
├── SettingError                  a setting has a value that cannot be
└── ClusterError                  a local cluster cannot run
    ├── ProcessExitedError        a process ended that should run
    └── StartTimeoutError         a process did not come up in time

The text of every error is one line that says what to do.
"""

from __future__ import annotations

from dataclasses import dataclass


class StepwireError(Exception):
    """Root of every error of this package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldViolation:
    """One field at fault."""

    field: str
    """Its path in the request, "input.sampling_params.top_p"."""
    description: str
    """The rule it breaks."""

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


class RpcError(StepwireError):
    """A call failed."""

    def __init__(
        self,
        message: str,
        *,
        code: str = "UNKNOWN",
        reason: str = "",
        field_violations: tuple[FieldViolation, ...] = (),
        retry_after_s: float | None = None,
        is_unreached: bool = False,
    ) -> None:
        """code: name of the gRPC status; reason: ErrorInfo.reason, "" where there is none.

        is_unreached: no connection to a server came about.
        """
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.field_violations = field_violations
        self.retry_after_s = retry_after_s
        self.is_unreached = is_unreached

    def __str__(self) -> str:
        message = super().__str__()
        missing = [str(v) for v in self.field_violations if v.field not in message]
        return "; ".join([message, *missing]) if message else "; ".join(missing) or self.code


class InvalidArgumentError(RpcError):
    """The request breaks a rule; sending it again will not help."""


class AlreadyExistsError(RpcError):
    """A request with this id is still running."""


class ResourceExhaustedError(RpcError):
    """A queue, a quota or the message size limit is full."""


class UnavailableError(RpcError):
    """No server answers, or it cannot take requests now."""


class DeadlineExceededError(RpcError):
    """The time allowed for the call is up."""


class RequestCancelledError(RpcError):
    """The caller ended the call."""


class AuthenticationError(RpcError):
    """The server wants a token, or another one."""


class TlsError(RpcError):
    """No connection stands that both sides trust; waiting does not help."""


class AbortedError(RpcError):
    """The server gave the call up, as its output was not read, or another call has taken over."""


class NotRetainedError(RpcError):
    """The server no longer has the request that was to be resumed; send it anew."""


class ServerError(RpcError):
    """A fault of the server, or a server that does not speak this protocol."""


class ModelError(StepwireError):
    """A model cannot be had."""


class UnknownModelError(ModelError):
    """Neither a known name nor a path that exists."""


class DownloadError(ModelError):
    """The package that holds the model could not be fetched."""


class ChecksumError(ModelError):
    """The bytes are not those that were expected."""


class SettingError(StepwireError):
    """A setting has a value that cannot be."""


class ClusterError(StepwireError):
    """A local cluster cannot run."""


class ProcessExitedError(ClusterError):
    """A process of the cluster ended although it should run."""


class StartTimeoutError(ClusterError):
    """A process of the cluster did not come up in time."""
