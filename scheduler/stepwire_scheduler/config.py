"""Everything that can be set on a scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stepwire_scheduler.speculation.config import (
    DEFAULT_SPECULATIVE_TOKENS,
    SpeculativeMethod,
)

SchedulingPolicy = Literal["fcfs", "priority"]
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Settings of one scheduler, read once at start."""

    model: str
    """Path of the model: a directory, or a .gguf file. Only its tokenizer is read here."""
    served_model_name: str | None = None
    """Name that clients see; default: the last part of the model's path."""
    executor_addresses: tuple[str, ...] = ("127.0.0.1:50052",)
    """HOST:PORT of each executor rank, comma-separated, rank 0 first."""
    standby_executor_addresses: tuple[tuple[str, ...], ...] = ()
    """Another group of executors with the same model, as --executor; may be repeated, or separated
    by semicolons. When the group that computes is lost or drains, the first that is ready goes on.
    """
    listen: str = "127.0.0.1:50051"
    """HOST:PORT of the gRPC server; port 0 takes a free one."""
    metrics_listen: str | None = None
    """HOST:PORT of Prometheus metrics over HTTP; default: none."""
    max_num_seqs: int | None = None
    """Most sequences in one step; default: the executor's."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one step; default: the executor's."""
    max_num_prefill_tokens: int = 512
    """Most tokens to prefill in one step while other streams go on: bounds their gaps."""
    max_inflight_steps: int = 2
    """Step plans sent ahead of their results; 1 waits for each."""
    scheduling_policy: SchedulingPolicy = "fcfs"
    """fcfs runs by arrival, priority by the request's priority, then arrival."""
    enable_prefix_caching: bool = True
    """Keep KV blocks of past prompts and share them."""
    speculative_method: SpeculativeMethod | None = None
    """Drafts several tokens a step for each sequence and keeps those that the model samples as
    well: ngram and suffix look them up in what was said before, draft_model asks the executor's
    --speculative-model. Default: none."""
    num_speculative_tokens: int | None = None
    """Most draft tokens a step for each sequence, 1 to 16; fewer where fewer pay. Default: 7 where
    there is a method."""
    speculative_ngram_min: int = 2
    """ngram and suffix: fewest tokens that must repeat before a draft."""
    speculative_ngram_max: int = 16
    """ngram: most tokens that are compared."""
    speculative_history_tokens: int = 65_536
    """suffix: tokens of ended requests that are kept for each tenant; 0: none."""
    max_queued_requests: int = 256
    """Requests that may wait; one more is RESOURCE_EXHAUSTED."""
    max_queued_tokens: int = 262_144
    """Prompt tokens that may wait."""
    default_deadline_ms: int = 120_000
    """Deadline of a request that brings none."""
    max_deadline_ms: int = 600_000
    """A longer deadline is shortened to this."""
    step_timeout_ms: int = 10_000
    """A step that takes longer ends the executors' epoch; one of more than 512 tokens may take
    longer in proportion."""
    max_resumes: int = 3
    """Times that one request survives the loss of its executors."""
    drain_timeout_ms: int = 30_000
    """How long running requests may take to end after SIGTERM."""
    max_unread_bytes: int = 65_536
    """Output of a request that may wait for its client."""
    unread_timeout_ms: int = 30_000
    """How long it may wait, once above that."""
    resume_retention_ms: int = 60_000
    """Longest time that a request goes on, and its output is kept, without a reader."""
    max_retained_bytes: int = 67_108_864
    """Output kept for clients that may come back; the oldest is forgotten first."""
    plan_log: str | None = None
    """File that gets every plan and result, prompts' tokens included, for the executor's replay."""
    plan_log_max_bytes: int = 67_108_864
    """Most bytes of that file; as much again may lie in the file before it, PATH.1."""
    journal: str | None = None
    """Folder that records requests with a resume window, so that a scheduler that is started again
    after a crash goes on with them; prompts and outputs included. Default: none."""
    journal_max_bytes: int = 134_217_728
    """Size at which the journal is written anew with what lives; at least twice what lives."""
    enable_reflection: bool = False
    """Serve grpc.reflection.v1alpha, for tools like grpcurl."""
    tls_cert: str | None = None
    """PEM file of the certificate that --listen shows; default: plain text."""
    tls_key: str | None = None
    """PEM file of its private key."""
    tls_client_ca: str | None = None
    """PEM file of CAs: clients must bring a certificate that one of them signed."""
    auth_tokens_file: str | None = None
    """File of tenants and the hashes of their bearer tokens; calls without one are refused."""
    max_requests_per_tenant: int = 32
    """Requests of one tenant, queued or running, where there are tokens."""
    executor_tls_ca: str | None = None
    """PEM file of CAs that sign the executors' certificates; default: plain text."""
    executor_tls_cert: str | None = None
    """PEM file of the certificate that executors see."""
    executor_tls_key: str | None = None
    """PEM file of its private key."""
    executor_tls_server_name: str | None = None
    """Name in the executors' certificates, where it is not the host in --executor."""
    local_socket: str | None = None
    """Path of a Unix socket that serves without TLS or token whoever may open it: this user."""
    insecure: bool = False
    """Allow addresses beyond loopback, without encryption or authentication."""
    log_level: LogLevel = "info"
    """Least severity that is logged."""

    @property
    def max_num_drafts(self) -> int:
        """num_speculative_tokens in force: 0 without a method."""
        if self.speculative_method is None:
            return 0
        return self.num_speculative_tokens or DEFAULT_SPECULATIVE_TOKENS
