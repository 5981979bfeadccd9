"""What an fp8 KV cache costs in quality, and saves in bytes, on the real model.

Run: GOMP_SPINCOUNT=1000 python -m benchmarks.fp8_kv [--tokens N] [--threads N]

Native kernels, bfloat16 weights and activations; only the dtype of the KV pages differs, and every
key and value is read back from them, a prompt's own included. Perplexity is over the prose of the
standard library's docstrings, in windows whose first tokens are context only: over their first
paragraphs, and over their last ones as a second text; the method was chosen by shorter runs over
both, so neither is unseen. For the agreement a
bfloat16 cache continues chat prompts greedily; each cache then reads prompt and continuation, and
a position agrees where the likeliest token is the one that was chosen.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from stepwire_client.models import resolve_model
from stepwire_executor.batch import StepBatch
from stepwire_executor.engine.key_offsets import measure_key_offsets
from stepwire_executor.kernels import select_kernels
from stepwire_executor.kv_cache import FP8_DTYPE, FP8_MAX, KVCache, StaticScales, bytes_per_block
from stepwire_executor.model import LoadedModel, load_model
from stepwire_executor.model.tokenizer_conversion import convert_gguf_tokenizer
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks import docstrings
from benchmarks.cluster import DEFAULT_MODEL
from benchmarks.common import Figures, finish, markdown_table

CLAIM = (
    "At most 53% of bfloat16's bytes, perplexity within 0.5% on both texts, 95% of greedy ids the "
    "same."
)
BLOCK_SIZE = 16
CHUNK_TOKENS = 512
"""Tokens a step."""
GOLDEN_FILE = Path(__file__).parents[1] / "tests" / "golden" / "smollm2_135m_greedy.json"
"""Twenty chat prompts, rendered and tokenised."""

BFLOAT16, FP8, FP8_STATIC = "bfloat16", "fp8, a scale a token and head", "fp8, static scales"


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """How a text is cut for its perplexity."""

    num_tokens: int = 2048
    """Tokens that a window holds."""
    num_context: int = 512
    """Tokens at its start that are read but not scored; the window before has scored them."""

    @property
    def num_scored(self) -> int:
        """Tokens that a window scores."""
        return self.num_tokens - self.num_context

    def cut(self, token_ids: Sequence[int], num_windows: int) -> list[list[int]]:
        """The first windows of a text that is long enough."""
        starts = range(0, num_windows * self.num_scored, self.num_scored)
        windows = [list(token_ids[start : start + self.num_tokens]) for start in starts]
        if len(windows[-1]) < self.num_tokens:
            raise ValueError(f"the text's {len(token_ids)} tokens are too few")
        return windows


class Reader:
    """One sequence at a time through a model and a KV cache of some kind."""

    def __init__(
        self,
        model: LoadedModel,
        max_tokens: int,
        *,
        kv_dtype: torch.dtype,
        static_scales: Sequence[StaticScales] | None = None,
        key_offsets: Sequence[Tensor] | None = None,
    ) -> None:
        self._model = model
        num_blocks = -(-max_tokens // BLOCK_SIZE)
        self.cache = KVCache(
            num_layers=model.config.num_layers,
            num_blocks=num_blocks,
            num_kv_heads=model.config.num_kv_heads,
            block_size=BLOCK_SIZE,
            head_dim=model.config.head_dim,
            dtype=kv_dtype,
            device=torch.device("cpu"),
            static_scales=static_scales,
            key_offsets=key_offsets,
        )
        self._block_table = torch.arange(num_blocks, dtype=torch.int32).view(1, -1)

    def step(self, token_ids: Sequence[int], start: int, first_row: int = 0) -> Tensor:
        """Read tokens at positions from start on; returns logits of rows first_row and later."""
        end = start + len(token_ids)
        positions = torch.arange(start, end)
        batch = StepBatch(
            token_ids=torch.tensor(token_ids),
            positions=positions,
            slot_mapping=positions,
            cu_seqlens_q=torch.tensor([0, len(token_ids)], dtype=torch.int32),
            seq_lens=torch.tensor([end], dtype=torch.int32),
            block_table=self._block_table,
            logit_rows=torch.arange(first_row, len(token_ids)),
        )
        return self._model.decoder.forward(batch, self.cache)

    def predictions(self, token_ids: Sequence[int], first: int) -> Iterator[tuple[int, Tensor]]:
        """Logits of the tokens at positions first (1 or more) to the end, in chunks.

        Yields the position of a chunk's first token and [num_tokens, vocab_size].
        """
        for start in range(0, len(token_ids) - 1, CHUNK_TOKENS):
            chunk = token_ids[start : min(start + CHUNK_TOKENS, len(token_ids) - 1)]
            first_row = min(max(first - 1 - start, 0), len(chunk))
            logits = self.step(chunk, start, first_row)
            if len(logits):
                yield start + first_row + 1, logits

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Continue a prompt with the likeliest tokens; none ends it."""
        token_ids = list(prompt)
        num_computed = 0
        for _ in range(num_tokens):
            logits = self.step(token_ids[num_computed:], num_computed)[-1]
            num_computed = len(token_ids)
            token_ids.append(int(logits.argmax()))
        return token_ids[len(prompt) :]


def load(threads: int | None = None) -> LoadedModel:
    """The real model in bfloat16 on the native kernels."""
    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device("cpu")
    return load_model(
        resolve_model(DEFAULT_MODEL),
        dtype=torch.bfloat16,
        kernels=select_kernels(device, "native"),
        device=device,
    )


def english(num_tokens: int, *, from_end: bool = False) -> list[int]:
    """At least so many token ids of docstrings' prose; raises ValueError where there is less.

    from_end: of the last paragraphs, the last one first.
    """
    file = next(resolve_model(DEFAULT_MODEL).glob("*.gguf"))
    tokenizer = Tokenizer.from_file(str(convert_gguf_tokenizer(file)))
    token_ids: list[int] = []
    paragraphs: Iterable[str] = docstrings.paragraphs()
    if from_end:
        paragraphs = reversed(list(paragraphs))
    for paragraph in paragraphs:
        token_ids += tokenizer.encode(paragraph + "\n\n", add_special_tokens=False).ids
        if len(token_ids) >= num_tokens:
            return token_ids
    raise ValueError(f"the standard library's prose has {len(token_ids)} tokens, not {num_tokens}")


def chat_prompts() -> list[list[int]]:
    """The token ids of twenty chat prompts."""
    cases = json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))["cases"]
    return [case["prompt_token_ids"] for case in cases]


def perplexity(reader: Reader, windows: Sequence[Sequence[int]], num_context: int) -> float:
    """Exponential of the mean negative log-likelihood, in nats, of the windows' scored tokens."""
    total, num_scored = 0.0, 0
    for window in windows:
        targets = torch.tensor(window)
        for position, logits in reader.predictions(window, num_context):
            chosen = targets[position : position + len(logits)].unsqueeze(1)
            losses = logits.logsumexp(dim=-1, keepdim=True) - logits.gather(1, chosen)
            total += float(losses.double().sum())
            num_scored += len(logits)
    return math.exp(total / num_scored)


def agreement(reader: Reader, prompts: Sequence[list[int]], outputs: Sequence[list[int]]) -> float:
    """Share of the outputs' positions where the likeliest token is the output's."""
    num_equal = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        chunks = reader.predictions(prompt + output, len(prompt))
        greedy = torch.cat([logits.argmax(dim=-1) for _, logits in chunks])
        num_equal += int((greedy == torch.tensor(output)).sum())
    return num_equal / sum(map(len, outputs))


def calibrate(reader: Reader, token_ids: Sequence[int]) -> tuple[StaticScales, ...]:
    """Scales that let each layer's largest key and value of a text just not saturate.

    reader: with unquantised pages, as many as the text fills.
    """
    for _ in reader.predictions(token_ids, len(token_ids)):
        pass
    return tuple(
        StaticScales(
            key=float(pages.key.float().abs().max()) / FP8_MAX,
            value=float(pages.value.float().abs().max()) / FP8_MAX,
        )
        for pages in reader.cache.layers
    )


def bytes_per_token(model: LoadedModel, kv_dtype: torch.dtype, *, is_static: bool = False) -> int:
    """Bytes of a token's keys and values in all layers, scales included."""
    return bytes_per_block(
        num_layers=model.config.num_layers,
        num_kv_heads=model.config.num_kv_heads,
        block_size=1,
        head_dim=model.config.head_dim,
        dtype=kv_dtype,
        has_static_scales=is_static,
    )


def measure(
    model: LoadedModel,
    *,
    num_tokens: int,
    windows: Windows,
    prompts: Sequence[list[int]],
    num_output_tokens: int,
) -> Figures:
    """Every cache on the same text and prompts."""
    num_windows = -(-num_tokens // windows.num_scored)
    num_text_tokens = (num_windows + 2) * windows.num_tokens
    text = english(num_text_tokens)
    scored = windows.cut(text, num_windows)
    second = windows.cut(english(num_text_tokens, from_end=True), num_windows)
    # What is scored must not have been seen: the text's end is past the last window.
    unseen = text[-windows.num_tokens :]

    def reader(
        kv_dtype: torch.dtype,
        static_scales: Sequence[StaticScales] | None = None,
        key_offsets: Sequence[Tensor] | None = None,
    ) -> Reader:
        return Reader(
            model,
            windows.num_tokens,
            kv_dtype=kv_dtype,
            static_scales=static_scales,
            key_offsets=key_offsets,
        )

    exact = reader(torch.bfloat16)
    scales = calibrate(exact, unseen)
    outputs = [exact.greedy(prompt, num_output_tokens) for prompt in prompts]
    by_cache: dict[str, dict[str, float]] = {}
    offsets = measure_key_offsets(model, torch.device("cpu"))
    for name, kv_dtype, static_scales, key_offsets in (
        (BFLOAT16, torch.bfloat16, None, None),
        (FP8, FP8_DTYPE, None, offsets),
        (FP8_STATIC, FP8_DTYPE, scales, None),
    ):
        cache_reader = reader(kv_dtype, static_scales, key_offsets)
        by_cache[name] = {
            "bytes_per_token": bytes_per_token(
                model, kv_dtype, is_static=static_scales is not None
            ),
            "perplexity": perplexity(cache_reader, scored, windows.num_context),
            "second_perplexity": perplexity(cache_reader, second, windows.num_context),
            "agreement": agreement(cache_reader, prompts, outputs),
        }
    baseline = by_cache[BFLOAT16]
    for figure in by_cache.values():
        for name in ("bytes_per_token", "perplexity", "second_perplexity"):
            figure[f"{name}_ratio"] = figure[name] / baseline[name]
    return {
        "num_scored_tokens": num_windows * windows.num_scored,
        "num_prompts": len(prompts),
        "num_output_tokens": num_output_tokens,
        "by_cache": by_cache,
    }


def markdown(figures: Figures) -> str:
    """A row a cache."""
    by_cache: Mapping[str, Mapping[str, float]] = figures["by_cache"]
    header = (
        "KV cache",
        "bytes a token",
        "of bfloat16's",
        "perplexity",
        "change",
        "second text",
        "change",
        "same greedy id",
    )
    rows = [
        (
            name,
            f"{figure['bytes_per_token']:,.0f}",
            f"{figure['bytes_per_token_ratio']:.1%}",
            f"{figure['perplexity']:.3f}",
            f"{figure['perplexity_ratio'] - 1:+.2%}",
            f"{figure['second_perplexity']:.3f}",
            f"{figure['second_perplexity_ratio'] - 1:+.2%}",
            f"{figure['agreement']:.1%}",
        )
        for name, figure in by_cache.items()
    ]
    return (
        f"{markdown_table(header, rows)}\n\n"
        f"Perplexity over {figures['num_scored_tokens']:,} tokens of either text; greedy ids at "
        f"{figures['num_prompts'] * figures['num_output_tokens']:,} positions after "
        f"{figures['num_prompts']} prompts."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8_kv")
    parser.add_argument("--tokens", type=int, default=20_000, help="to score, rounded up")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args(arguments)
    model = load(options.threads)
    figures = measure(
        model,
        num_tokens=options.tokens,
        windows=Windows(),
        prompts=chat_prompts(),
        num_output_tokens=64,
    )
    finish("fp8_kv", parameters=vars(options), figures=figures, table=markdown(figures))


if __name__ == "__main__":
    main()
