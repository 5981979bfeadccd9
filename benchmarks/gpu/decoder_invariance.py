"""A whole decoder of random weights: a row's logits alone, in batches, and from a CUDA graph."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from stepwire_executor.batch import StepBatch
from stepwire_executor.kernels import select_kernels
from stepwire_executor.kv_cache import KVCache
from stepwire_executor.model.decoder import Decoder
from stepwire_executor.model.hf_config import read_hf_config
from stepwire_executor.model.weights.dummy import DummyWeights
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.model_directory import SMALL, TINY, write_model
from benchmarks.gpu.operations import make_batch
from benchmarks.gpu.report import Outcome, Row

_BLOCK_SIZE = 16
_CHUNK = 200
"""Tokens of a prompt a step; most prompts take several."""


class _Sequences:
    """Prompts of random tokens, each with a fixed number of blocks of a scattered pool."""

    def __init__(self, bench: Bench, decoder: Decoder, lengths: Sequence[int]) -> None:
        self._device = bench.device
        self._decoder = decoder
        self.lengths = list(lengths)
        self._num_blocks = -(-max(lengths) // _BLOCK_SIZE)
        generator = bench.generator(3)
        self._tokens = torch.randint(
            decoder.config.vocab_size, (len(lengths), max(lengths)), generator=generator,
            device=self._device,
        )  # fmt: skip
        order = torch.randperm(
            len(lengths) * self._num_blocks, generator=generator, device=self._device
        )
        self._table = order.view(len(lengths), self._num_blocks).to(torch.int32)

    def cache(self) -> KVCache:
        """Pages for all sequences."""
        config = self._decoder.config
        return KVCache(
            num_layers=config.num_layers,
            num_blocks=self._table.numel(),
            num_kv_heads=config.num_kv_heads,
            block_size=_BLOCK_SIZE,
            head_dim=config.head_dim,
            dtype=self._decoder.dtype,
            device=self._device,
        )

    def batch(self, chunks: Sequence[tuple[int, int, int]]) -> StepBatch:
        """A step over (sequence, first, last), with the logits of each last token."""
        device = self._device
        rows = torch.cat([torch.full((b - a,), i, device=device) for i, a, b in chunks])
        positions = torch.cat([torch.arange(a, b, device=device) for _, a, b in chunks])
        blocks = self._table[rows, positions // _BLOCK_SIZE].long()
        lengths = torch.tensor([0] + [b - a for _, a, b in chunks], device=device)
        cu_seqlens = lengths.cumsum(0)
        return make_batch(
            token_ids=self._tokens[rows, positions],
            positions=positions,
            slot_mapping=blocks * _BLOCK_SIZE + positions % _BLOCK_SIZE,
            cu_seqlens_q=cu_seqlens.to(torch.int32),
            seq_lens=torch.tensor([b for _, _, b in chunks], dtype=torch.int32, device=device),
            block_table=self._table[[i for i, _, _ in chunks]].contiguous(),
            logit_rows=cu_seqlens[1:] - 1,
            max_query_len=max(b - a for _, a, b in chunks),
        )

    def decoded(self, members: Sequence[int], chunk: int) -> Tensor:
        """Prefill members side by side in chunks, decode the last token of all in one step."""
        cache = self.cache()
        computed = dict.fromkeys(members, 0)
        while work := [
            (i, computed[i], min(computed[i] + chunk, self.lengths[i] - 1))
            for i in members
            if computed[i] < self.lengths[i] - 1
        ]:
            # Few at a time: a step's activations stay small.
            for start in range(0, len(work), 16):
                part = work[start : start + 16]
                self._decoder.forward(self.batch(part), cache)
                computed |= {i: last for i, _, last in part}
        self._cache = cache
        last = [(i, self.lengths[i] - 1, self.lengths[i]) for i in members]
        return self._decoder.forward(self.batch(last), cache)

    def replayed(self, members: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The decode step of members eagerly and from a graph, over the cache of decoded()."""
        batch = self.batch([(i, self.lengths[i] - 1, self.lengths[i]) for i in members])
        decoder, cache = self._decoder, self._cache
        eager = decoder.forward(batch, cache)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            logits = decoder.forward(batch, cache)
        with torch.inference_mode():
            logits.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        return eager, logits.clone()


def check(bench: Bench) -> Outcome:
    """Logits of batch 1 against 8, 32 and 256, chunked otherwise, and graph against eager."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as scratch:
        config = read_hf_config(write_model(Path(scratch), bench.pick(SMALL, TINY)))
    # Not through the loader: it needs packages that reading no weights does not.
    decoder = Decoder(
        config,
        DummyWeights(config),
        select_kernels(bench.device, "triton"),
        dtype=bench.pick(torch.bfloat16, torch.float32),
        device=bench.device,
        max_model_len=config.max_position_embeddings,
        on_progress=lambda _phase, _fraction: None,
    )
    generator = random.Random(bench.seed)
    sizes = bench.pick((8, 32, 256), (3,))
    lengths = [generator.randint(*bench.pick((2, 900), (2, 20))) for _ in range(max(sizes))]
    lengths[0] = bench.pick(1_300, 24)
    sequences = _Sequences(bench, decoder, lengths)
    watched = range(bench.pick(4, 2))
    alone = {i: sequences.decoded([i], chunk=_CHUNK) for i in watched}
    differences: list[str] = []
    num_compared = 0
    for size in sizes:
        members = list(range(size))
        generator.shuffle(members)
        together = sequences.decoded(members, chunk=bench.pick(_CHUNK // 3, 9))
        for i in watched:
            num_compared += 1
            row = members.index(i)
            if not torch.equal(together[row : row + 1], alone[i]):
                differences.append(f"row {i} in a batch of {size}")
    outcome.rows.append(
        Row.of_check(
            f"decoder's logits at batch 1 against {', '.join(map(str, sizes))}",
            figure=f"{len(differences)} of {num_compared} differ"
            + "".join(f"; {x}" for x in differences[:3]),
            target="0 differ",
            denominator="batch 1",
            is_right=not differences,
        )
    )
    outcome.figures = {"num_compared": num_compared, "differences": differences}
    if bench.device.type != "cuda":
        outcome.notes.append("graph against eager: left out, CUDA graphs need a CUDA device")
        return outcome
    unequal = []
    for size in (1, 8, 64):
        members = list(range(size))
        sequences.decoded(members, chunk=_CHUNK)
        eager, replayed = sequences.replayed(members)
        if not torch.equal(eager, replayed):
            unequal.append(f"batch {size}")
    outcome.figures["graph_differs_at"] = unequal
    outcome.rows.append(
        Row.of_check(
            "decoder's logits from a CUDA graph, batch 1, 8 and 64",
            figure=f"{len(unequal)} differ" + "".join(f"; {x}" for x in unequal),
            target="0 differ",
            denominator="eager",
            is_right=not unequal,
        )
    )
    return outcome
