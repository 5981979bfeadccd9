"""Times prefill attention: its FLOP rate, against torch's flash attention and a naive one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from stepwire_executor.kv_cache import FP8_DTYPE
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.bench import Bench, times_json
from benchmarks.gpu.operations import attend
from benchmarks.gpu.paged_sequences import AttentionCase, PagedSequences
from benchmarks.gpu.report import Outcome, Row
from benchmarks.gpu.timing import Call, ratio

_TABLE_TOKENS = 32_768
"""Context that the block tables have room for, as in an executor that serves so much."""
_CHUNK = 512


def _case(bench: Bench, page_dtype: torch.dtype) -> AttentionCase:
    return AttentionCase(
        num_kv_heads=bench.pick(8, 1),
        group=bench.pick(4, 2),
        head_dim=bench.pick(128, 16),
        block_size=bench.pick(64, 16),
        dtype=bench.half,
        page_dtype=page_dtype,
    )


def _prefill(bench: Bench, case: AttentionCase, context: int, num_queries: int) -> Call:
    """Attend the last queries of one prompt."""
    sequences = PagedSequences(
        case,
        [context],
        generator=bench.generator(),
        is_poisoned=False,
        table_width=bench.pick(_TABLE_TOKENS, 128) // case.block_size,
    )
    batch = sequences.batch([(0, context - num_queries, context)])
    query = bench.randn(num_queries, case.num_heads, case.head_dim, dtype=case.dtype)
    pages = sequences.pages
    return lambda: attend(query, pages, batch, scale=case.scale)


def _dense(bench: Bench, case: AttentionCase, context: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of every head: [1, num_heads, context, head_dim]."""
    shape = (1, case.num_heads, context, case.head_dim)
    query, key, value = (bench.randn(*shape, dtype=case.dtype, salt=salt) for salt in range(3))
    return query, key, value


def naive_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Causal attention over materialised scores, float32 softmax; the queries come last.

    query: [1, num_heads, num_queries, head_dim]; key, value: [1, num_heads, context, head_dim].
    """
    scores = (query @ key.transpose(-1, -2)).float() * scale
    num_queries, context = scores.shape[-2:]
    own = torch.arange(context - num_queries, context, device=query.device).unsqueeze(1)
    is_hidden = torch.arange(context, device=query.device) > own
    return scores.masked_fill(is_hidden, -torch.inf).softmax(dim=-1).to(value.dtype) @ value


def measure(bench: Bench) -> Outcome:
    """An 8k prompt, the naive product at 4k, fp8 pages, and both backends of torch."""
    outcome = Outcome()
    case = _case(bench, bench.half)
    context = bench.pick(8_192, 48)
    query, key, value = _dense(bench, case, context)

    def torch_attention(backend: SDPBackend) -> Call:
        def run() -> object:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(query, key, value, is_causal=True)

        return run

    variants: dict[str, Callable[[], object]] = {
        "ours": _prefill(bench, case, context, context),
        "ours, fp8 pages": _prefill(bench, _case(bench, FP8_DTYPE), context, context),
        "flash": torch_attention(bench.pick(SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)),
    }
    if not bench.is_rehearsal:
        cudnn = torch_attention(SDPBackend.CUDNN_ATTENTION)
        try:
            cudnn()
        except RuntimeError:
            outcome.notes.append("torch's cuDNN attention: left out, this build has none")
        else:
            variants["cudnn"] = cudnn
    times = bench.timer.measure({name: [call] for name, call in variants.items()}, budget_s=3.0)
    flops = 4 * context**2 * case.head_dim * case.num_heads / 2
    tflops = {name: flops / of.median / 1e9 for name, of in times.items()}
    speed = ratio(times["flash"], times["ours"])
    fp8_time = ratio(times["ours, fp8 pages"], times["ours"])
    outcome.figures["prompt of 8k"] = {
        "times": times_json(times),
        "tflops": tflops,
        "speed_over_flash": speed,
        "fp8_over_bf16": fp8_time,
    }
    outcome.rows += [
        Row.of_target("prefill", tflops["ours"], denominator="2 products, half masked"),
        Row.of_target(
            "prefill_sdpa", speed, denominator=f"flash {tflops['flash']:.0f} TFLOPS, in turn"
        ),
        Row.of_report(
            "prefill attention with fp8 KV, same shapes",
            f"{tflops['ours, fp8 pages']:.0f} TFLOPS, {fp8_time:.3f} of bf16's time",
            denominator="bf16, in turn",
        ),
    ]
    if "cudnn" in times:
        outcome.rows.append(
            Row.of_report("torch's cuDNN attention, same shapes", f"{tflops['cudnn']:.0f} TFLOPS")
        )
    return outcome


def measure_naive(bench: Bench) -> Outcome:
    """Materialised scores against ours at 4k, and the scratch memory of both by context."""
    outcome = Outcome()
    case = _case(bench, bench.half)
    context = bench.pick(4_096, 40)
    query, key, value = _dense(bench, case, context)
    times = bench.timer.measure(
        {
            "naive": [lambda: naive_attention(query, key, value, scale=case.scale)],
            "ours": [_prefill(bench, case, context, context)],
        }
    )
    times_faster = ratio(times["naive"], times["ours"])
    outcome.figures["prompt of 4k"] = {"times": times_json(times), "times_faster": times_faster}
    outcome.rows.append(Row.of_target("naive", times_faster, denominator="ours, in turn"))
    scratch: dict[str, dict[int, float]] = {"naive": {}, "ours": {}}
    chunk = bench.pick(_CHUNK, 12)
    for length in bench.pick((2_048, 4_096, 8_192), (24, 48)):
        query, key, value = _dense(bench, case, length)
        last = query[:, :, -chunk:]
        scratch["naive"][length] = _scratch_mib(
            bench, lambda q=last, k=key, v=value: naive_attention(q, k, v, scale=case.scale)
        )
        scratch["ours"][length] = _scratch_mib(bench, _prefill(bench, case, length, chunk))
    outcome.figures["scratch_mib"] = scratch
    growth = max(scratch["ours"].values()) - min(scratch["ours"].values())
    outcome.rows += [
        Row.of_target("attention_memory", growth, denominator=f"the last {chunk} tokens"),
        Row.of_report(
            f"scratch memory at {', '.join(f'{n:,}' for n in scratch['ours'])} tokens",
            "ours "
            + ", ".join(f"{x:.1f}" for x in scratch["ours"].values())
            + "; naive "
            + ", ".join(f"{x:.1f}" for x in scratch["naive"].values())
            + " MiB",
        ),
    ]
    if bench.device.type != "cuda":
        outcome.notes.append("scratch memory: zeros, only a CUDA device counts allocations")
    return outcome


def _scratch_mib(bench: Bench, call: Call) -> float:
    """Most memory that a call holds beside what was there before it."""
    if bench.device.type != "cuda":
        call()
        return 0.0
    call()  # compiled code and caches are not scratch
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del out
    return peak / 2**20
