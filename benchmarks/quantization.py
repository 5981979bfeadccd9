"""What weights in integers cost in quality, and save in bytes, on the real model.

Run: GOMP_SPINCOUNT=1000 python -m benchmarks.quantization [--tokens N] [--threads N]

The model's file holds 4-bit weights with an 8-bit head. It is served as it is stored, and with its
weights dequantised to float32 and to bfloat16; all that differs is the arithmetic, so these should
agree. Its bfloat16 weights, written as a checkpoint of their own, are then rounded at load by
`--quantization int4`: weights that lay on one grid lose on another, as weights that never lay on
any would. Texts, windows and prompts as of benchmarks.fp8_kv; KV pages in bfloat16, or float32
with float32. A bfloat16 model continues the chat prompts greedily, and a position agrees where
the likeliest token is the one that was chosen.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from stepwire_client.models import resolve_model
from stepwire_executor.kernels import select_kernels
from stepwire_executor.model import LoadedModel, load_model

from benchmarks.cluster import DEFAULT_MODEL
from benchmarks.common import Figures, finish, markdown_table
from benchmarks.fp8_kv import Reader, Windows, agreement, chat_prompts, english, perplexity
from benchmarks.truncated_model import write_truncated_model

CLAIM = (
    "As stored, perplexity within 0.1% of the file's own dequantised weights; layers in "
    "`--quantization int4` at most 28% of bfloat16's bytes."
)
NUM_OUTPUT_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Weights, and how they are served."""

    name: str
    is_checkpoint: bool = False
    """Whether of the bfloat16 checkpoint; else of the file."""
    dtype: torch.dtype = torch.bfloat16
    quantization: Literal["auto", "none", "int4"] = "none"
    group_size: Literal[32, 64] = 64


BFLOAT16 = "dequantised to bfloat16"
VARIANTS = (
    Variant(name=BFLOAT16),
    Variant(name="dequantised to float32", dtype=torch.float32),
    Variant(name="as stored", quantization="auto"),
    Variant(name="int4 at load, groups of 64", is_checkpoint=True, quantization="int4"),
    Variant(
        name="int4 at load, groups of 32", is_checkpoint=True, quantization="int4", group_size=32
    ),
)
"""The first is what the others are compared with."""


@contextmanager
def bfloat16_checkpoint(path: Path) -> Iterator[Path]:
    """A directory with a model's dequantised weights, as long as it is used."""
    with tempfile.TemporaryDirectory() as directory:
        write_truncated_model(path, Path(directory), dtype="bfloat16")
        yield Path(directory)


def load(variant: Variant, file: Path, checkpoint: Path) -> LoadedModel:
    """The variant on the native kernels."""
    device = torch.device("cpu")
    return load_model(
        checkpoint if variant.is_checkpoint else file,
        dtype=variant.dtype,
        kernels=select_kernels(device, "native"),
        device=device,
        quantization=variant.quantization,
        quantization_group_size=variant.group_size,
    )


def layer_bytes(model: LoadedModel) -> int:
    """Of the packed weights of all layers: what is left are the embedding, the head and a norm."""
    return sum(layer.num_bytes for layer in model.decoder.layers)


def measure(
    file: Path,
    *,
    num_tokens: int,
    windows: Windows,
    prompts: Sequence[list[int]],
    num_output_tokens: int,
) -> Figures:
    """Every variant on the same texts and prompts."""
    num_windows = -(-num_tokens // windows.num_scored)
    num_text_tokens = (num_windows + 1) * windows.num_tokens
    first = windows.cut(english(num_text_tokens), num_windows)
    second = windows.cut(english(num_text_tokens, from_end=True), num_windows)
    outputs: list[list[int]] = []
    by_weights: dict[str, dict[str, float | str]] = {}
    with bfloat16_checkpoint(file) as checkpoint:
        for variant in VARIANTS:
            model = load(variant, file, checkpoint)
            reader = Reader(model, windows.num_tokens, kv_dtype=model.dtype)
            if not outputs:
                outputs = [reader.greedy(prompt, num_output_tokens) for prompt in prompts]
            by_weights[variant.name] = {
                "quantization": model.quantization,
                "weight_bytes": model.weight_bytes,
                "layer_bytes": layer_bytes(model),
                "perplexity": perplexity(reader, first, windows.num_context),
                "second_perplexity": perplexity(reader, second, windows.num_context),
                "agreement": agreement(reader, prompts, outputs),
            }
            print(variant.name, by_weights[variant.name], flush=True)
    baseline = by_weights[BFLOAT16]
    for figure in by_weights.values():
        for name in ("weight_bytes", "layer_bytes", "perplexity", "second_perplexity"):
            figure[f"{name}_ratio"] = float(figure[name]) / float(baseline[name])
    return {
        "num_scored_tokens": num_windows * windows.num_scored,
        "num_prompts": len(prompts),
        "num_output_tokens": num_output_tokens,
        "by_weights": by_weights,
    }


def markdown(figures: Figures) -> str:
    """A row a variant."""
    by_weights: Mapping[str, Mapping[str, float]] = figures["by_weights"]
    header = (
        "weights",
        "MB",
        "of bfloat16's",
        "layers, of bfloat16's",
        "perplexity",
        "change",
        "second text",
        "change",
        "same greedy id",
    )
    rows = [
        (
            name,
            f"{figure['weight_bytes'] / 1e6:,.1f}",
            f"{figure['weight_bytes_ratio']:.1%}",
            f"{figure['layer_bytes_ratio']:.1%}",
            f"{figure['perplexity']:.3f}",
            f"{figure['perplexity_ratio'] - 1:+.2%}",
            f"{figure['second_perplexity']:.3f}",
            f"{figure['second_perplexity_ratio'] - 1:+.2%}",
            f"{figure['agreement']:.1%}",
        )
        for name, figure in by_weights.items()
    ]
    return (
        f"{markdown_table(header, rows)}\n\n"
        f"Perplexity over {figures['num_scored_tokens']:,} tokens of either text; greedy ids at "
        f"{figures['num_prompts'] * figures['num_output_tokens']:,} positions after "
        f"{figures['num_prompts']} prompts."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization")
    parser.add_argument("--tokens", type=int, default=20_000, help="to score, rounded up")
    parser.add_argument("--prompts", type=int, default=20, help="to continue, at most 20")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    figures = measure(
        next(resolve_model(DEFAULT_MODEL).glob("*.gguf")),
        num_tokens=options.tokens,
        windows=Windows(),
        prompts=chat_prompts()[: options.prompts],
        num_output_tokens=NUM_OUTPUT_TOKENS,
    )
    finish("quantization", parameters=vars(options), figures=figures, table=markdown(figures))


if __name__ == "__main__":
    main()
