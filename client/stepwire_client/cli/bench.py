"""`stepwire bench`: latency and throughput of a running server."""

from __future__ import annotations

import asyncio
import json
import platform
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from stepwire_client.aio import AsyncClient
from stepwire_client.benchmark.load import measure, run_load
from stepwire_client.benchmark.summary import DEFINITIONS, parse_goodput, summarise
from stepwire_client.benchmark.workload import WorkItem, random_workload, read_workload
from stepwire_client.cli.options import ConnectionOptions
from stepwire_client.cli.screen import PhaseProgress
from stepwire_client.client import DEFAULT_ADDRESS
from stepwire_client.errors import SettingError, StepwireError
from stepwire_client.events import ModelInfo, ModelState
from stepwire_client.params import SamplingParams

LATENCY_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}


def bench(
    *,
    address: str = DEFAULT_ADDRESS,
    dataset: str = "random",
    num_prompts: int = 32,
    input_len: int = 128,
    output_len: int = 128,
    max_concurrency: int | None = None,
    request_rate: float | None = None,
    seed: int = 0,
    temperature: float = 0.0,
    num_warmups: int = 1,
    goodput: list[str] | None = None,
    timeout_s: float = 600.0,
    save_result: Path | None = None,
    connection: ConnectionOptions | None = None,
) -> None:
    """Measure latency and throughput of a running server, as its clients see them.

    Parameters
    ----------
    address
        Of the scheduler, HOST:PORT.
    dataset
        random: prompts of random token ids; else a file with one JSON object a line: "prompt"
        or "messages", and "output_len" where it differs.
    num_prompts
        Requests to send.
    input_len
        Tokens of a random prompt.
    output_len
        Tokens to generate; end-of-sequence does not stop.
    max_concurrency
        Closed loop: so many requests under way; the next starts when one ends.
    request_rate
        Open loop: requests a second, at the random moments of a Poisson process.
    seed
        Of prompts and moments.
    temperature
        Of sampling.
    num_warmups
        Requests before the measurement that do not count.
    goodput
        Targets in milliseconds, such as ttft:200 tpot:50; may be repeated.
    timeout_s
        Time limit of a request.
    save_result
        File to write the numbers to, as JSON with the field names of vLLM's benchmark.
    """
    for name, value in (("num-prompts", num_prompts), ("input-len", input_len)):
        _check(name, value > 0, "must be at least 1")
    _check("output-len", output_len > 0, "must be at least 1")
    _check("max-concurrency", max_concurrency is None or max_concurrency > 0, "must be at least 1")
    _check("request-rate", request_rate is None or request_rate > 0, "must be above 0")
    targets = parse_goodput(goodput or ())
    credentials = (connection or ConnectionOptions()).to_credentials()

    def workload_for(model: ModelInfo) -> list[WorkItem]:
        if dataset != "random":
            return read_workload(Path(dataset), num_prompts=num_prompts, output_len=output_len)
        return random_workload(
            num_prompts=num_prompts,
            input_len=input_len,
            output_len=output_len,
            vocab_size=model.vocab_size,
            excluded_token_ids=model.eos_token_ids,
            seed=seed,
        )

    def params_of(item: WorkItem) -> SamplingParams:
        return SamplingParams(
            max_tokens=item.output_len, temperature=temperature, seed=seed, ignore_eos=True
        )

    async def run() -> tuple[ModelInfo, dict[str, Any]]:
        async with AsyncClient(address, credentials=credentials) as client:
            # Asked at once, so that a server that is not there is not waited for.
            model = await client.get_model()
            with PhaseProgress() as progress:
                if model.state is not ModelState.READY:
                    model = await client.wait_until_ready(on_progress=progress.update_from)
                workload = workload_for(model)
                # Other prompts than the measured ones, so that these are not in the cache.
                for i in range(num_warmups):
                    progress.update("warm up", i / num_warmups)
                    await _warm_up(client, model, input_len, timeout_s, seed=f"warm-up {i}")
                progress.update("measure", 0.0)
                records, duration_s = await run_load(
                    client,
                    workload,
                    max_concurrency=max_concurrency,
                    request_rate=request_rate,
                    params_of=params_of,
                    seed=seed,
                    timeout_s=timeout_s,
                    on_done=_reporter(progress, len(workload)),
                )
        summary = summarise(records, duration_s=duration_s, goodput=targets)
        errors = sorted({record.error for record in records if record.error is not None})
        return model, summary | {"errors": errors}

    model, summary = asyncio.run(run())
    result: dict[str, Any] = {
        "date": f"{datetime.now():%Y%m%d-%H%M%S}",
        "backend": "stepwire",
        "model_id": model.model,
        "dtype": model.dtype,
        "quantization": model.quantization,
        "kv_cache_dtype": model.kv_cache_dtype,
        "device": model.device,
        "host": f"{platform.machine()} {platform.system()}, Python {platform.python_version()}",
        "dataset_name": "random" if dataset == "random" else "custom",
        "num_prompts": num_prompts,
        "request_rate": request_rate if request_rate is not None else "inf",
        "burstiness": 1.0,
        "max_concurrency": max_concurrency,
        "seed": seed,
        "goodput_targets_ms": targets or None,
        "definitions": DEFINITIONS,
        **summary,
    }
    print(table(result))
    if save_result is not None:
        try:
            save_result.write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise SettingError(f"--save-result {save_result}: {error.strerror}") from error
    if not result["completed"]:
        raise StepwireError(f"no request succeeded: {'; '.join(result['errors'][:3])}")


def table(result: dict[str, Any]) -> str:
    """The numbers in columns, each beside its definition."""
    load = (
        f"Poisson, {result['request_rate']} requests/s"
        if result["request_rate"] != "inf"
        else "all at once"
    )
    if result["max_concurrency"] is not None:
        load += f", at most {result['max_concurrency']} at a time"
    lines = [
        f"{result['model_id']} ({result['dtype']}, {result['device']}): {load}",
        f"requests           {result['completed']} completed, {result['failed']} failed, "
        f"{result['duration']:.2f} s",
        f"tokens             {result['total_input_tokens']} in "
        f"({result['total_cached_tokens']} cached), {result['total_output_tokens']} out",
        f"requests/s         {result['request_throughput']:.2f}",
    ]
    if result["request_goodput"] is not None:
        lines.append(f"  within targets   {result['request_goodput']:.2f}")
    lines += [
        f"output tokens/s    {result['output_throughput']:.1f}",
        f"all tokens/s       {result['total_token_throughput']:.1f}",
        "",
        f"{'ms':<6}" + "".join(f"{n:>10}" for n in ("mean", "median", "std", "p90", "p99")),
    ]
    for name, label in LATENCY_NAMES.items():
        values = (
            result[f"{statistic}_{name}_ms"]
            for statistic in ("mean", "median", "std", "p90", "p99")
        )
        numbers = "".join(f"{value:>10.2f}" for value in values)
        lines.append(f"{label:<6}{numbers}  {DEFINITIONS[name]}")
    if result["errors"]:
        lines += ["", *(f"failed: {error}" for error in result["errors"][:3])]
    return "\n".join(lines)


async def _warm_up(
    client: AsyncClient, model: ModelInfo, input_len: int, timeout_s: float, *, seed: str
) -> None:
    (item,) = random_workload(
        num_prompts=1,
        input_len=input_len,
        output_len=2,
        vocab_size=model.vocab_size,
        excluded_token_ids=model.eos_token_ids,
        seed=seed,
    )
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    record = await measure(client, item, params=params, timeout_s=timeout_s)
    if record.error is not None:
        raise StepwireError(record.error)


def _reporter(progress: PhaseProgress, total: int) -> Callable[[int], None]:
    return lambda num_done: progress.update("measure", num_done / total)


def _check(option: str, is_valid: bool, rule: str) -> None:
    if not is_valid:
        raise SettingError(f"--{option} {rule}")
