"""What can go wrong in a scheduler, and the gRPC status of each.

SchedulerError
├── ConfigError               a flag or environment variable is wrong
├── ListenError               the address cannot be served
├── TokenizerFilesError       the tokenizer's files are missing or not usable
├── PlanStreamError           the epoch is over: a rank is gone, overdue or wrong
├── ExecutorMismatchError     the executors named do not make one group
│   └── ExecutorTlsError          one of them and the scheduler do not trust each other
├── InvalidRequestError       the request is at fault; names every field
├── ChatTemplateError         the template refuses the messages; becomes InvalidRequestError
├── TextTooLongError          more tokens than allowed; becomes InvalidRequestError
├── DuplicateRequestError     its id is still running
├── UnauthenticatedError      the call brings no valid token
├── NotRetainedError          nothing, or not this, is kept to resume; send it anew
├── QueueFullError            too much waits already; retry later
├── QuotaExceededError        the tenant has too many requests under way; retry later
├── UnavailableError          nothing can run now; retry later
│   ├── NotReadyError             the model, or its tokenizer, still loads
│   ├── DrainingError             the scheduler ends
│   └── ExecutorLostError         executors failed under the request too often
├── DeadlineExceededError     its deadline passed, queued or running
├── ReaderAbortedError        the call ends and the request may live on
│   ├── SlowReaderError           its output was not read for too long
│   └── TakenOverError            another call reads it now
└── InternalError             a defect, or the executor could not go on with the request

A message is one line for the client: no path, no stack trace, nothing of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from grpc import StatusCode

EpochEnd = Literal["handover", "lost", "overdue", "refused", "disagreed"]
"""Why an epoch was over: a rank asked for it; a stream broke; a step, or the opening, did not come
back in time; a rank did not open the epoch; results contradicted the plan or one another."""

ERROR_DOMAIN = "stepwire.dev"
"""Domain of every google.rpc.ErrorInfo."""

MAX_VIOLATIONS = 32
"""Field violations in one status: trailing metadata stays below gRPC's 8 KiB."""


class SchedulerError(Exception):
    """Base of the scheduler's own errors."""

    reason = "INTERNAL"
    """ErrorInfo.reason: stable, for programs."""
    retry_after_ms: int | None = None
    """When to come back (RetryInfo); None: the same request will fail again."""

    def __init__(self, message: str, *, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        if retry_after_ms is not None:
            self.retry_after_ms = retry_after_ms


class ConfigError(SchedulerError):
    """Flags or environment variables are wrong."""


class ListenError(SchedulerError):
    """The listen address cannot be bound."""


class TokenizerFilesError(SchedulerError):
    """The tokenizer's files are missing or not usable; for the operator."""


class PlanStreamError(SchedulerError):
    """The plan stream broke, so the epoch is over; for the step loop and the log."""

    cause: EpochEnd = "lost"

    def __init__(self, message: str, *, cause: EpochEnd = "lost") -> None:
        super().__init__(message)
        self.cause = cause


class ExecutorMismatchError(SchedulerError):
    """The executors named do not make one group; for the operator."""


class ExecutorTlsError(ExecutorMismatchError):
    """An executor's connection cannot be secured as the flags say; for the operator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldViolation:
    """One field at fault."""

    field: str
    """Path from the request message, "input.sampling_params.top_p"."""
    description: str
    """What is wrong and what is allowed."""


class InvalidRequestError(SchedulerError):
    """The request can never run as it is."""

    reason = "INVALID_REQUEST"

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        assert violations
        first = violations[0]
        more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
        super().__init__(f"{first.field}: {first.description}{more}")
        self.violations = tuple(violations)


class ChatTemplateError(SchedulerError):
    """The chat template refused the messages, or could not render them within its limits."""


class TextTooLongError(SchedulerError):
    """A text has certainly more tokens than it may have."""

    def __init__(self, max_tokens: int) -> None:
        super().__init__(f"the text has more than {max_tokens} tokens")


class DuplicateRequestError(SchedulerError):
    """A request of the same id is queued or running."""

    reason = "DUPLICATE_REQUEST_ID"

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request {request_id} is still running; choose another request_id")


class UnauthenticatedError(SchedulerError):
    """The call brings no token, or one that is not known; which of them is not said."""

    reason = "UNAUTHENTICATED"


class NotRetainedError(SchedulerError):
    """A call would resume what is not there: never sent, of another input, or forgotten."""

    reason = "NOT_RETAINED"


class QueueFullError(SchedulerError):
    """The queue's bound in requests or tokens is reached."""

    reason = "QUEUE_FULL"
    retry_after_ms = 1_000


class QuotaExceededError(SchedulerError):
    """The tenant has as many requests under way as it may have."""

    reason = "QUOTA_EXCEEDED"
    retry_after_ms = 1_000


class UnavailableError(SchedulerError):
    """Nothing can run now."""

    reason = "UNAVAILABLE"
    retry_after_ms = 1_000


class NotReadyError(UnavailableError):
    """The executors, or the tokenizer, are still loading."""

    reason = "MODEL_NOT_READY"


class DrainingError(UnavailableError):
    """The scheduler finishes what runs and ends."""

    reason = "DRAINING"

    def __init__(self) -> None:
        super().__init__("the server is shutting down; try another")


class ExecutorLostError(UnavailableError):
    """Executors failed under the request more often than it may be resumed."""

    reason = "EXECUTOR_LOST"


class DeadlineExceededError(SchedulerError):
    """The request's deadline passed, queued or running."""

    reason = "DEADLINE_EXCEEDED"


class ReaderAbortedError(SchedulerError):
    """The call ends; a request with a resume window lives on."""


class SlowReaderError(ReaderAbortedError):
    """The client left too much output unread for too long."""

    reason = "SLOW_READER"


class TakenOverError(ReaderAbortedError):
    """Another call attached to the request."""

    reason = "TAKEN_OVER"


class InternalError(SchedulerError):
    """A defect, or a sequence that the executor could not go on with."""


# The first class of an error's method resolution order that is listed here decides.
STATUS: dict[type[SchedulerError], StatusCode] = {
    SchedulerError: StatusCode.INTERNAL,
    InvalidRequestError: StatusCode.INVALID_ARGUMENT,
    DuplicateRequestError: StatusCode.ALREADY_EXISTS,
    UnauthenticatedError: StatusCode.UNAUTHENTICATED,
    NotRetainedError: StatusCode.OUT_OF_RANGE,
    QueueFullError: StatusCode.RESOURCE_EXHAUSTED,
    QuotaExceededError: StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: StatusCode.UNAVAILABLE,
    DeadlineExceededError: StatusCode.DEADLINE_EXCEEDED,
    ReaderAbortedError: StatusCode.ABORTED,
}


def status_code(error: SchedulerError) -> StatusCode:
    """The gRPC status of an error."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
