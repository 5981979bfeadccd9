"""What Prometheus reads of a scheduler."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from stepwire_scheduler.errors import EpochEnd

_LATENCY_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0),
)
_STEP_BUCKETS_S = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01),
    *(0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0),
)
_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1_024, 2_048, 4_096, 8_192)

# Names that autoscalers, routers and dashboards of the field read.
_VLLM_ALIASES = {
    "stepwire_requests_running": "vllm:num_requests_running",
    "stepwire_requests_waiting": "vllm:num_requests_waiting",
    "stepwire_kv_cache_usage_ratio": "vllm:kv_cache_usage_perc",
    "stepwire_request_queue_seconds": "vllm:request_queue_time_seconds",
    "stepwire_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "stepwire_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "stepwire_request_duration_seconds": "vllm:e2e_request_latency_seconds",
    "stepwire_prompt_tokens": "vllm:prompt_tokens",
    "stepwire_output_tokens": "vllm:generation_tokens",
    "stepwire_preemptions": "vllm:num_preemptions",
    "stepwire_prefix_cache_query_tokens": "vllm:prefix_cache_queries",
    "stepwire_prefix_cache_hit_tokens": "vllm:prefix_cache_hits",
    "stepwire_requests_finished": "vllm:request_success",
    "stepwire_spec_drafts": "vllm:spec_decode_num_drafts",
    "stepwire_spec_draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "stepwire_spec_accepted_tokens": "vllm:spec_decode_num_accepted_tokens",
    "stepwire_spec_accepted_per_pos": "vllm:spec_decode_num_accepted_tokens_per_pos",
}

_Instrument = TypeVar("_Instrument", Counter, Gauge, Histogram)


class Metrics:
    """Counters, gauges and histograms, with a method for each event; no event costs I/O."""

    def __init__(self, model_name: str) -> None:
        """model_name labels the aliases, as their readers expect."""
        self.registry = CollectorRegistry()
        self._collectors: list[Collector] = []
        self._running = self._gauge("requests_running", "Sequences in the last step.")
        self._waiting = self._gauge("requests_waiting", "Sequences that wait for a slot.")
        self._blocks_used = self._gauge("kv_blocks_used", "KV blocks that sequences hold.")
        self._blocks = self._gauge("kv_blocks", "KV blocks of the pool.")
        self._kv_usage = self._gauge("kv_cache_usage_ratio", "Used blocks over all, 0 to 1.")
        self._load_fraction = self._gauge(
            "model_load_progress_ratio", "How far the executors' load has come, 0 to 1."
        )
        self._load_seconds = self._gauge("model_load_seconds", "Time of the load so far.")
        self._ready = self._gauge("ready", "1 while requests run.")
        self._queued = self._counter("requests_queued", "Requests admitted to the queue.")
        self._rejected = self._counter("requests_rejected", "Requests refused.", "reason")
        self._finished = self._counter(
            "requests_finished", "Requests that ended.", "finished_reason"
        )
        self._streams_resumed = self._counter(
            "streams_resumed", "Calls that went on with a request."
        )
        self._detached = self._gauge("requests_detached", "Requests that run and nobody reads.")
        self._retained_bytes = self._gauge(
            "retained_output_bytes", "Output that is kept for clients that may come back."
        )
        self._restored = self._counter(
            "requests_restored", "Requests of a scheduler before that this one went on with."
        )
        self._journal_bytes = self._gauge(
            "journal_bytes", "Size of the journal; 0 while it cannot be written."
        )
        self._journal_failures = self._counter(
            "journal_failures", "Times that the journal could not be written any more."
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of ended requests.")
        self._output_tokens = self._counter("output_tokens", "Tokens generated.")
        # Their label takes only the names in --auth-tokens-file, never what a client sends.
        self._tenant_requests = self._counter(
            "tenant_requests_finished", "Requests of a tenant that ended.", "tenant"
        )
        self._tenant_prompt_tokens = self._counter(
            "tenant_prompt_tokens", "Prompt tokens of a tenant's ended requests.", "tenant"
        )
        self._tenant_output_tokens = self._counter(
            "tenant_output_tokens", "Tokens generated for a tenant.", "tenant"
        )
        self._preemptions = self._counter("preemptions", "Sequences that lost their blocks.")
        self._prefix_queries = self._counter(
            "prefix_cache_query_tokens", "Prompt tokens looked up in the prefix cache."
        )
        self._prefix_hits = self._counter(
            "prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache."
        )
        self._queue_seconds = self._histogram(
            "request_queue_seconds", "From arrival to the first step.", _LATENCY_BUCKETS_S
        )
        self._ttft_seconds = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _LATENCY_BUCKETS_S
        )
        self._inter_token_seconds = self._histogram(
            "inter_token_latency_seconds", "Gap between tokens.", _LATENCY_BUCKETS_S
        )
        self._duration_seconds = self._histogram(
            "request_duration_seconds", "From arrival to the end.", _LATENCY_BUCKETS_S
        )
        self._request_output_tokens = self._histogram(
            "request_output_tokens", "Tokens generated for a request.", _TOKEN_BUCKETS
        )
        self._schedule_seconds = self._histogram(
            "schedule_seconds", "Planning one step.", _STEP_BUCKETS_S
        )
        self._step_seconds = self._histogram(
            "step_seconds", "One step, from plan sent to result.", _STEP_BUCKETS_S
        )
        self._wire_seconds = self._histogram(
            "wire_seconds",
            "Of a step, what the executor did not have it: the way there and back.",
            _STEP_BUCKETS_S,
        )
        self._step_tokens = self._histogram("step_tokens", "Tokens in one step.", _TOKEN_BUCKETS)
        self._busy_seconds = self._counter(
            "executor_busy_seconds", "Time in which rank 0 computed steps."
        )
        self._idle_seconds = self._counter(
            "executor_idle_seconds",
            "Time in which rank 0 had no step to compute though sequences could go on.",
        )
        self._drafts = self._counter(
            "spec_drafts", "Drafts verified: one a sequence and step that had any."
        )
        self._draft_tokens = self._counter("spec_draft_tokens", "Draft tokens verified.")
        self._accepted_tokens = self._counter(
            "spec_accepted_tokens", "Draft tokens that the model sampled as well."
        )
        self._accepted_per_pos = self._counter(
            "spec_accepted_per_pos", "Drafts accepted to this position, from 0.", "position"
        )
        self._epochs = self._counter(
            "epochs_ended", "Epochs of the plan stream that ended, by cause.", "cause"
        )
        self._resumed = self._counter(
            "sequences_resumed", "Running sequences whose executors were lost under them."
        )
        self._handed_over = self._counter(
            "sequences_handed_over", "Running sequences that draining executors gave back."
        )
        self._ready_standbys = self._gauge(
            "standby_groups_ready", "Groups of executors that could take over."
        )
        self.registry.register(_Aliases(self._collectors, model_name))

    def on_request_queued(self) -> None:
        self._queued.inc()

    def on_rejected(self, reason: str) -> None:
        """reason: ErrorInfo.reason of the error."""
        self._rejected.labels(reason).inc()

    def on_first_scheduled(self, queue_seconds: float) -> None:
        self._queue_seconds.observe(queue_seconds)

    def on_first_token(self, seconds: float) -> None:
        """seconds: from arrival."""
        self._ttft_seconds.observe(seconds)

    def on_inter_token(self, seconds: float) -> None:
        self._inter_token_seconds.observe(seconds)

    def on_finished(
        self,
        reason: str,
        e2e_seconds: float,
        prompt_tokens: int,
        output_tokens: int,
        tenant: str = "",
    ) -> None:
        """One request ended; output_tokens over all its sequences; tenant: "" is not counted."""
        self._finished.labels(reason).inc()
        self._duration_seconds.observe(e2e_seconds)
        self._prompt_tokens.inc(prompt_tokens)
        self._output_tokens.inc(output_tokens)
        self._request_output_tokens.observe(output_tokens)
        if tenant:
            self._tenant_requests.labels(tenant).inc()
            self._tenant_prompt_tokens.labels(tenant).inc(prompt_tokens)
            self._tenant_output_tokens.labels(tenant).inc(output_tokens)

    def on_stream_resumed(self) -> None:
        self._streams_resumed.inc()

    def set_retained(self, *, num_detached: int, num_bytes: int) -> None:
        """What waits for clients to come back."""
        self._detached.set(num_detached)
        self._retained_bytes.set(num_bytes)

    def on_request_restored(self) -> None:
        self._restored.inc()

    def set_journal_bytes(self, num_bytes: int) -> None:
        self._journal_bytes.set(num_bytes)

    def on_journal_failed(self) -> None:
        self._journal_failures.inc()

    def on_preemption(self, num_sequences: int = 1) -> None:
        self._preemptions.inc(num_sequences)

    def on_prefix_lookup(self, query_tokens: int, hit_tokens: int) -> None:
        self._prefix_queries.inc(query_tokens)
        self._prefix_hits.inc(hit_tokens)

    def on_step(
        self,
        *,
        num_running: int,
        num_waiting: int,
        blocks_used: int,
        blocks_total: int,
        schedule_seconds: float,
        step_seconds: float,
        wire_seconds: float,
        busy_seconds: float,
        idle_seconds: float,
        num_batched_tokens: int,
    ) -> None:
        """A step's result came back."""
        self.set_load(num_running=num_running, num_waiting=num_waiting)
        self._blocks_used.set(blocks_used)
        self._blocks.set(blocks_total)
        self._kv_usage.set(blocks_used / blocks_total if blocks_total else 0.0)
        self._schedule_seconds.observe(schedule_seconds)
        self._step_seconds.observe(step_seconds)
        self._wire_seconds.observe(wire_seconds)
        self._busy_seconds.inc(busy_seconds)
        self._idle_seconds.inc(idle_seconds)
        self._step_tokens.observe(num_batched_tokens)

    def on_drafts(self, outcomes: Iterable[tuple[int, int]]) -> None:
        """A step's drafts: how many tokens each had, and how many of them were accepted.

        Empty drafts do not count.
        """
        for num_drafted, num_accepted in outcomes:
            if not num_drafted:
                continue
            self._drafts.inc()
            self._draft_tokens.inc(num_drafted)
            self._accepted_tokens.inc(num_accepted)
            for position in range(num_accepted):
                self._accepted_per_pos.labels(str(position)).inc()

    def on_epoch_ended(self, cause: EpochEnd, *, num_running: int) -> None:
        """num_running: sequences that are queued again."""
        self._epochs.labels(cause).inc()
        (self._handed_over if cause == "handover" else self._resumed).inc(num_running)

    def set_ready_standbys(self, num_groups: int) -> None:
        """Groups beside the one that computes."""
        self._ready_standbys.set(num_groups)

    def set_load(self, *, num_running: int, num_waiting: int) -> None:
        """Sequences now; also called when the last one ends."""
        self._running.set(num_running)
        self._waiting.set(num_waiting)

    def set_model_load(self, *, fraction: float, elapsed_seconds: float, is_ready: bool) -> None:
        """How far the executors are."""
        self._load_fraction.set(fraction)
        self._load_seconds.set(elapsed_seconds)
        self._ready.set(is_ready)

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return self._add(Counter(f"stepwire_{name}", description, labels, registry=None))

    def _gauge(self, name: str, description: str) -> Gauge:
        return self._add(Gauge(f"stepwire_{name}", description, registry=None))

    def _histogram(self, name: str, description: str, buckets: tuple[float, ...]) -> Histogram:
        return self._add(Histogram(f"stepwire_{name}", description, buckets=buckets, registry=None))

    def _add(self, collector: _Instrument) -> _Instrument:
        self.registry.register(collector)
        self._collectors.append(collector)
        return collector


class _Aliases(Collector):
    """The same samples under the field's names, made when they are read."""

    def __init__(self, originals: Iterable[Collector], model_name: str) -> None:
        self._originals = tuple(originals)
        self._labels = {"model_name": model_name, "engine": "0"}

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        for original in (metric for each in self._originals for metric in each.collect()):
            alias = _VLLM_ALIASES.get(original.name)
            if alias is None:
                continue
            metric = Metric(alias, original.documentation, original.type)
            metric.samples = [
                Sample(
                    alias + sample.name.removeprefix(original.name),
                    {**sample.labels, **self._labels},
                    *sample[2:],
                )
                for sample in original.samples
            ]
            yield metric


def serve_metrics(metrics: Metrics, host: str, port: int) -> tuple[WSGIServer, int]:
    """Serve /metrics from a thread of its own; returns the server and its port.

    Raises OSError if the address cannot be bound.
    """
    server, _thread = start_http_server(port, host, registry=metrics.registry)
    return server, server.server_port
