"""Goes on with the requests that a scheduler before has left in the journal."""

from __future__ import annotations

import structlog

from stepwire_scheduler.detokenizer import TokenBytes
from stepwire_scheduler.errors import ExecutorLostError, SchedulerError
from stepwire_scheduler.journal import Journal
from stepwire_scheduler.journal_entries import JournalledRequest
from stepwire_scheduler.metrics import Metrics
from stepwire_scheduler.planner import Planner
from stepwire_scheduler.running_requests import RunningRequests
from stepwire_scheduler.sequence import Sequence
from stepwire_scheduler.served_model import ServedModel

log = structlog.get_logger(__name__)


def restore(
    journal: Journal,
    requests: RunningRequests,
    planner: Planner,
    tokenizer: TokenBytes,
    model: ServedModel,
    metrics: Metrics,
) -> None:
    """Queue what had not ended, in its order and with the tokens that it has; keep what had.

    Nobody reads any of it yet, so each has its resume window from now on. The queue's bounds do
    not count: it was accepted once.
    """
    saved_requests = list((journal.saved or {}).values())
    for saved in saved_requests:
        sequences = [] if saved.ending is not None else _queue(planner, saved)
        error = None if saved.ending is not None else _obstacle(saved, model)
        requests.restore(saved, sequences, tokenizer, error)
        metrics.on_request_restored()
    journal.saved = None
    journal.rotate(requests.images())
    log.info(
        "journal read",
        num_running=sum(saved.ending is None for saved in saved_requests),
        num_ended=sum(saved.ending is not None for saved in saved_requests),
    )


def _queue(planner: Planner, saved: JournalledRequest) -> list[Sequence]:
    sequences = planner.add(saved.request)
    for sequence in sequences:
        output = saved.log.output_of(sequence.index)
        planner.take_over(sequence, output.token_ids, output.finish_reason)
        scheduled = saved.log.scheduled_of(sequence.index)
        if scheduled is not None:
            sequence.first_scheduled_ms = saved.request.arrival_ms + scheduled.queue_ms
            sequence.num_cached_tokens = scheduled.num_cached_tokens
    return sequences


def _obstacle(saved: JournalledRequest, model: ServedModel) -> SchedulerError | None:
    """Why the request cannot go on with this model."""
    request = saved.request
    if saved.model != model.fingerprint:
        return ExecutorLostError("the model changed")
    num_tokens = len(request.prompt_token_ids) + request.sampling_params.max_tokens
    if num_tokens > model.max_model_len:
        return ExecutorLostError("the executors came back with too small a KV cache for it")
    return None
