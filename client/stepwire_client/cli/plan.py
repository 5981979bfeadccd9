"""`stepwire plan`: what a model needs, before anything is loaded."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Annotated, Any

from cyclopts import Parameter

from stepwire_client.cli import host
from stepwire_client.cli.session import fetch_model
from stepwire_client.cluster_config import Dtype, KVCacheDtype, Quantization, QuantizationGroupSize
from stepwire_client.errors import ModelError

DEFAULT_GPU_MEMORY_UTILIZATION = 0.9


def plan(
    model: str,
    /,
    *,
    dtype: Dtype | None = None,
    quantization: Quantization | None = None,
    quantization_group_size: QuantizationGroupSize | None = None,
    kv_cache_dtype: KVCacheDtype | None = None,
    block_size: int | None = None,
    max_num_batched_tokens: int | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    tensor_parallel_size: int = 1,
    speculative_model: str | None = None,
    gpu_memory_bytes: int | None = None,
    gpu_memory_utilization: float = DEFAULT_GPU_MEMORY_UTILIZATION,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Show the memory that a model needs, without loading it.

    Parameters
    ----------
    model
        A known name, a folder or a .gguf file; a known one is fetched when it is missing.
    dtype
        Of weights and activations.
    quantization
        Integers for weights: auto is as stored, none dequantises, int4 rounds floats.
    quantization_group_size
        Inputs that share a scale under int4.
    kv_cache_dtype
        Of keys and values.
    block_size
        Tokens a KV block.
    max_num_batched_tokens
        Most tokens a step; activations grow with it.
    max_model_len
        Tokens of a sequence to plan for; the model's context if not given.
    max_num_seqs
        Sequences to plan for; 64, or 256 on a GPU.
    tensor_parallel_size
        Executors that share the model; what each holds is shown too.
    speculative_model
        A known name, a folder or a .gguf file of a draft model, which every executor holds whole.
    gpu_memory_bytes
        Memory of the GPU, or of each, to plan for; this machine's memory if not given.
    gpu_memory_utilization
        Part of the GPU's memory that may be used in all.
    as_json
        Print one JSON object.
    """
    path = fetch_model(model)
    flags: dict[str, object] = {
        "--dtype": dtype,
        "--quantization": quantization,
        "--quantization-group-size": quantization_group_size,
        "--kv-cache-dtype": kv_cache_dtype,
        "--block-size": block_size,
        "--max-num-batched-tokens": max_num_batched_tokens,
        "--max-num-seqs": max_num_seqs,
        "--tensor-parallel-size": tensor_parallel_size,
    }
    if speculative_model is not None:
        flags["--speculative-model"] = fetch_model(speculative_model)
    if gpu_memory_bytes is not None:
        flags["--gpu-memory-bytes"] = gpu_memory_bytes
        flags["--gpu-memory-utilization"] = gpu_memory_utilization
    numbers = _ask_executor(str(path), {k: v for k, v in flags.items() if v is not None})
    context = max_model_len or int(numbers["max_position_embeddings"])
    available = host.available_memory_bytes()
    if gpu_memory_bytes is not None:
        available = int(gpu_memory_bytes * gpu_memory_utilization) * tensor_parallel_size
    result = numbers | {
        "max_model_len": context,
        "kv_bytes": int(numbers["kv_bytes_per_token"]) * context * numbers["max_num_seqs"],
        "available_bytes": available,
    }
    if as_json:
        print(json.dumps(result))
    else:
        print(table(result))


def table(numbers: dict[str, Any]) -> str:
    """The plan in words and columns."""
    context, seqs = numbers["max_model_len"], numbers["max_num_seqs"]
    total = numbers["weight_bytes"] + numbers["activation_bytes"] + numbers["kv_bytes"]
    rows = [
        ("weights", host.in_bytes(numbers["weight_bytes"])),
        ("activations", host.in_bytes(numbers["activation_bytes"])),
        (f"KV of {seqs} x {context} tokens", host.in_bytes(numbers["kv_bytes"])),
        ("together", host.in_bytes(total)),
    ]
    if numbers.get("quantization", "none") != "none":
        rows.insert(1, ("of which matrices", numbers["quantization"]))
    if "draft_weight_bytes" in numbers:
        rows.insert(1, ("of them the draft model's", host.in_bytes(numbers["draft_weight_bytes"])))
    available = numbers["available_bytes"]
    if available is not None:
        rows.append(("available", host.in_bytes(available)))
    rows.append(("KV a token", host.in_bytes(numbers["kv_bytes_per_token"])))
    if "kv_cache_bytes" in numbers:
        rows.append(("KV pool", host.in_bytes(numbers["kv_cache_bytes"])))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value:>12}" for name, value in rows]
    if len(numbers["ranks"]) > 1:
        lines += ["", *_rank_lines(numbers), ""]
    if available is not None:
        lines.append(_verdict(numbers, available))
    return "\n".join(lines)


def _rank_lines(numbers: dict[str, Any]) -> list[str]:
    """What each rank holds, and how far the largest is from an even share of the weights."""
    ranks = numbers["ranks"]
    tokens = numbers["max_model_len"] * numbers["max_num_seqs"]
    rows: list[tuple[str, ...]] = [("rank", "weights", "activations", "KV", "KV a token")]
    for each in ranks:
        sizes = (
            each["weight_bytes"],
            each["activation_bytes"],
            each["kv_bytes_per_token"] * tokens,
            each["kv_bytes_per_token"],
        )
        rows.append((str(each["rank"]), *map(host.in_bytes, sizes)))
    lines = [f"{name:<4}" + "".join(f"{cell:>14}" for cell in cells) for name, *cells in rows]
    split = sum(each["weight_bytes"] - each["norm_bytes"] for each in ranks)
    even = split / len(ranks) + ranks[0]["norm_bytes"]
    most = max(each["weight_bytes"] for each in ranks)
    lines.append(
        f"an even share is 1/{len(ranks)} of {host.in_bytes(split)} and the "
        f"{host.in_bytes(ranks[0]['norm_bytes'])} that each holds whole; "
        f"the largest rank has {most / even:.2%} of it"
    )
    return lines


def _verdict(numbers: dict[str, Any], available: int) -> str:
    context, seqs = numbers["max_model_len"], numbers["max_num_seqs"]
    room = available - numbers["weight_bytes"] - numbers["activation_bytes"]
    # On GPUs the rank with the least room sets the pool.
    num_tokens = numbers.get("kv_cache_tokens", room // numbers["kv_bytes_per_token"])
    if num_tokens >= context * seqs:
        return "fits"
    if num_tokens >= context:
        return (
            f"fits {num_tokens // context} sequences of {context} tokens at once, or more that "
            "are shorter: blocks are allocated on demand"
        )
    return "does not fit a single sequence: lower --max-model-len, or try --kv-cache-dtype fp8"


def _ask_executor(path: str, flags: dict[str, object]) -> dict[str, Any]:
    if importlib.util.find_spec("stepwire_executor") is None:
        raise ModelError("plan needs the executor: pip install 'stepwire[executor]'")
    command = [sys.executable, "-m", "stepwire_executor.plan", "--model", path, "--json"]
    for flag, value in flags.items():
        command += [flag, str(value)]
    finished = subprocess.run(  # noqa: S603  # our own module
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if finished.returncode != 0:
        lines = finished.stderr.strip().splitlines()
        raise ModelError(lines[-1] if lines else f"plan ended with code {finished.returncode}")
    numbers = json.loads(finished.stdout)
    assert isinstance(numbers, dict), numbers
    return numbers
