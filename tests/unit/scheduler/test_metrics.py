"""What Prometheus reads."""

from __future__ import annotations

import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families
from stepwire_scheduler.metrics import Metrics, serve_metrics


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics("tiny")
    metrics.on_request_queued()
    metrics.on_first_scheduled(0.02)
    metrics.on_first_token(0.2)
    metrics.on_inter_token(0.01)
    metrics.on_prefix_lookup(100, 64)
    metrics.on_preemption(2)
    metrics.on_stream_resumed()
    metrics.set_retained(num_detached=5, num_bytes=6_000)
    metrics.on_rejected("QUEUE_FULL")
    metrics.on_finished("stop", 1.5, prompt_tokens=100, output_tokens=7)
    metrics.on_epoch_ended("handover", num_running=4)
    metrics.on_epoch_ended("overdue", num_running=2)
    metrics.on_epoch_ended("overdue", num_running=3)
    metrics.set_ready_standbys(1)
    metrics.on_drafts([(4, 3), (0, 0), (2, 0), (3, 1)])
    metrics.set_model_load(fraction=0.5, elapsed_seconds=3.0, is_ready=False)
    metrics.on_step(
        num_running=3,
        num_waiting=1,
        blocks_used=25,
        blocks_total=100,
        schedule_seconds=0.0002,
        step_seconds=0.02,
        wire_seconds=0.001,
        busy_seconds=0.03,
        idle_seconds=0.002,
        num_batched_tokens=3,
    )
    return metrics


@pytest.mark.parametrize(
    ("sample", "value"),
    [
        ("stepwire_requests_running", 3),
        ("stepwire_requests_waiting", 1),
        ("stepwire_kv_cache_usage_ratio", 0.25),
        ("stepwire_model_load_progress_ratio", 0.5),
        ("stepwire_time_to_first_token_seconds_sum", 0.2),
        ("stepwire_output_tokens_total", 7),
        ("stepwire_streams_resumed_total", 1),
        ("stepwire_requests_detached", 5),
        ("stepwire_retained_output_bytes", 6_000),
        ("stepwire_prefix_cache_hit_tokens_total", 64),
        ("stepwire_wire_seconds_sum", 0.001),
        ("stepwire_executor_busy_seconds_total", 0.03),
        ("stepwire_executor_idle_seconds_total", 0.002),
        ("stepwire_sequences_handed_over_total", 4),
        ("stepwire_sequences_resumed_total", 5),
        ("stepwire_standby_groups_ready", 1),
        ("stepwire_spec_drafts_total", 3),
        ("stepwire_spec_draft_tokens_total", 9),
        ("stepwire_spec_accepted_tokens_total", 4),
    ],
)
def test_events_are_counted_under_names_with_units(
    metrics: Metrics, sample: str, value: float
) -> None:
    assert metrics.registry.get_sample_value(sample) == value


def test_epochs_are_counted_by_why_they_ended(metrics: Metrics) -> None:
    value = metrics.registry.get_sample_value
    assert value("stepwire_epochs_ended_total", {"cause": "handover"}) == 1
    assert value("stepwire_epochs_ended_total", {"cause": "overdue"}) == 2


def test_accepted_drafts_are_counted_by_position(metrics: Metrics) -> None:
    value = metrics.registry.get_sample_value
    name, alias = (
        "stepwire_spec_accepted_per_pos_total",
        "vllm:spec_decode_num_accepted_tokens_per_pos_total",
    )
    counts = [value(name, {"position": str(position)}) for position in range(4)]
    assert counts == [2, 1, 1, None]
    labels = {"position": "0", "model_name": "tiny", "engine": "0"}
    assert value(alias, labels) == 2


@pytest.mark.parametrize(
    ("sample", "value"),
    [
        ("vllm:num_requests_running", 3),
        ("vllm:num_requests_waiting", 1),
        ("vllm:kv_cache_usage_perc", 0.25),
        ("vllm:time_to_first_token_seconds_count", 1),
        ("vllm:inter_token_latency_seconds_count", 1),
        ("vllm:e2e_request_latency_seconds_sum", 1.5),
        ("vllm:prompt_tokens_total", 100),
        ("vllm:generation_tokens_total", 7),
        ("vllm:num_preemptions_total", 2),
        ("vllm:prefix_cache_queries_total", 100),
        ("vllm:prefix_cache_hits_total", 64),
        ("vllm:spec_decode_num_drafts_total", 3),
        ("vllm:spec_decode_num_draft_tokens_total", 9),
        ("vllm:spec_decode_num_accepted_tokens_total", 4),
    ],
)
def test_the_fields_names_show_the_same_values(metrics: Metrics, sample: str, value: float) -> None:
    labels = {"model_name": "tiny", "engine": "0"}
    assert metrics.registry.get_sample_value(sample, labels) == value


def test_metrics_are_served_as_text_that_parses(metrics: Metrics) -> None:
    server, port = serve_metrics(metrics, "127.0.0.1", 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
            text = response.read().decode()
    finally:
        server.shutdown()
        server.server_close()
    families = {family.name for family in text_string_to_metric_families(text)}
    assert {"stepwire_requests_running", "vllm:num_requests_running"} <= families


def test_usage_is_counted_by_tenant_where_there_are_tenants() -> None:
    metrics = Metrics("m")
    metrics.on_finished("stop", 1.5, prompt_tokens=100, output_tokens=7, tenant="alice")
    metrics.on_finished("stop", 1.5, prompt_tokens=10, output_tokens=3, tenant="alice")
    metrics.on_finished("stop", 1.5, prompt_tokens=1, output_tokens=1)

    def value(name: str, tenant: str) -> float | None:
        return metrics.registry.get_sample_value(
            f"stepwire_tenant_{name}_total", {"tenant": tenant}
        )

    assert value("requests_finished", "alice") == 2
    assert value("prompt_tokens", "alice") == 110
    assert value("output_tokens", "alice") == 10
    assert value("requests_finished", "") is None
