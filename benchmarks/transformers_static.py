"""32 concurrent requests, 128 tokens in and 128 out, against `generate` of transformers.

Run: python -m benchmarks.transformers_static [--dtype bfloat16|float32] [--rounds N]

Both have the same weights (ours read from the GGUF file, theirs dequantised from it by
the package gguf), dtype, threads, prompts and greedy choice, and never run at the same time: the
rounds alternate. transformers gets one static batch of 32 rows of equal length, its best case: no
padding, no row that ends early, no server between. Ours is the whole system: 32 gRPC streams,
scheduler and executor processes; prompts of a round are new to it.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from stepwire_client.aio import AsyncClient
from stepwire_client.benchmark.workload import WorkItem, random_workload
from stepwire_client.events import ModelInfo
from stepwire_client.models import resolve_model

from benchmarks.cluster import DEFAULT_MODEL, generate_all, local_cluster
from benchmarks.common import Figures, finish, markdown_table, ratios, show, spread

CLAIM = "At least twice the output of transformers' generate with a static batch of 32."

Generate = Callable[[list[list[int]], int], None]
"""Continues prompts of equal length by so many tokens each."""


def load_transformers(path: Path, dtype: str, num_threads: int) -> Generate:
    """The model in transformers, as a function; path: a folder or a .gguf file."""
    import torch
    import transformers

    torch.set_num_threads(num_threads)
    directory = path.parent if path.is_file() else path
    model: Any
    if next(directory.glob("*.gguf"), None) is not None:
        model = _golden_loader().load(directory)
        # Parameters only: the table of rotary frequencies stays in float32, as when it is loaded
        # from safetensors.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype))
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype)
        )
    model.eval()
    model.generation_config.eos_token_id = None

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                pad_token_id=0,
            )
        if made.shape != (len(prompts), len(prompts[0]) + num_tokens):
            raise RuntimeError(f"generate made a tensor of shape {tuple(made.shape)}")

    return generate


def _golden_loader() -> ModuleType:
    """The loader that the golden test holds us to; it shares no code with ours."""
    file = Path(__file__).parents[1] / "tests" / "golden" / "transformers_smollm2.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def workload(options: argparse.Namespace, model: ModelInfo, seed: str) -> list[WorkItem]:
    """The requests of one round."""
    return random_workload(
        num_prompts=options.num_requests,
        input_len=options.input_len,
        output_len=options.output_len,
        vocab_size=model.vocab_size,
        excluded_token_ids=model.eos_token_ids,
        seed=seed,
    )


async def measure(
    address: str, model: ModelInfo, generate: Generate, options: argparse.Namespace
) -> Figures:
    """Alternate the two; the first call of each does not count."""
    num_tokens = options.num_requests * options.output_len
    stepwire: list[float] = []
    transformers: list[float] = []
    async with AsyncClient(address) as client:
        for number in range(-1, options.rounds):
            items = workload(options, model, f"round {number}")
            if number < 0:
                await generate_all(client, items)
                generate([list(item.prompt) for item in items], 4)  # type: ignore[arg-type]
                continue
            stepwire.append(num_tokens / (await generate_all(client, items))[1])
            started = time.perf_counter()
            # In this thread: nothing else happens in this process meanwhile.
            generate([list(item.prompt) for item in items], options.output_len)  # type: ignore[arg-type]
            transformers.append(num_tokens / (time.perf_counter() - started))
            print(
                f"round {number + 1}: stepwire {stepwire[-1]:.1f}, "
                f"transformers {transformers[-1]:.1f} output tokens/s"
            )
    return {
        "dtype": model.dtype,
        "num_requests": options.num_requests,
        "input_len": options.input_len,
        "output_len": options.output_len,
        "num_threads": options.num_threads,
        "output_tokens_per_s": {
            "stepwire": spread(stepwire),
            "transformers": spread(transformers),
        },
        "ratio": ratios(stepwire, transformers),
    }


def markdown(figures: Figures) -> str:
    """Output tokens a second of both, and the ratio."""
    rows = [
        (
            "transformers `generate`, one static batch",
            show(figures["output_tokens_per_s"]["transformers"]),
            "1",
        ),
        (
            "stepwire, over gRPC",
            show(figures["output_tokens_per_s"]["stepwire"]),
            show(figures["ratio"], 2, " times"),
        ),
    ]
    table = markdown_table(("system", "output tokens/s", "ratio"), rows)
    return (
        f"{table}\n\n{figures['num_requests']} requests at once, {figures['input_len']} tokens in, "
        f"{figures['output_len']} out, {figures['dtype']}, {figures['num_threads']} threads, "
        "prefill included."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transformers_static")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--num-requests", type=int, default=32)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    generate = load_transformers(resolve_model(options.model), options.dtype, options.num_threads)
    settings = {
        "dtype": options.dtype,
        "num_threads": options.num_threads,
        "max_num_seqs": options.num_requests,
    }
    with local_cluster(options.model, **settings) as (cluster, model):
        figures = asyncio.run(measure(cluster.address, model, generate, options))
    name = "transformers_static"
    if options.dtype != parser.get_default("dtype"):
        name += f"_{options.dtype}"
    finish(name, parameters=vars(options), figures=figures, table=markdown(figures))


if __name__ == "__main__":
    main()
