"""Sampling by the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from stepwire_executor.kernels.interface import Sample, SampleOutput, SamplingBatch
from stepwire_executor.kernels.native.library import NativeLibrary


def make_sample(library: NativeLibrary) -> Sample:
    """Return the operation; see `interface.Sample`."""
    run = library.sample

    def sample(logits: Tensor, batch: SamplingBatch) -> SampleOutput:
        num_rows, vocab_size = logits.shape
        if logits.dtype != torch.float32 or logits.stride(1) != 1:
            raise ValueError("logits must be float32 with unit stride in the vocabulary")
        for parameter, dtype in (
            (batch.temperature, torch.float32),
            (batch.top_k, torch.int32),
            (batch.top_p, torch.float32),
            (batch.min_p, torch.float32),
            (batch.seeds, torch.int64),
            (batch.positions, torch.int64),
            (batch.streams, torch.int64),
        ):
            if (
                parameter.dtype != dtype
                or parameter.shape != (num_rows,)
                or not parameter.is_contiguous()
            ):
                raise ValueError(
                    f"a sampling parameter is {parameter.dtype} {tuple(parameter.shape)}, "
                    f"expected contiguous {dtype} [{num_rows}]"
                )
        token_ids = torch.empty(num_rows, dtype=torch.int64)
        is_finite = torch.empty(num_rows, dtype=torch.bool)
        run(
            logits.data_ptr(),
            logits.stride(0),
            num_rows,
            vocab_size,
            batch.temperature.data_ptr(),
            batch.top_k.data_ptr(),
            batch.top_p.data_ptr(),
            batch.min_p.data_ptr(),
            batch.seeds.data_ptr(),
            batch.positions.data_ptr(),
            batch.streams.data_ptr(),
            token_ids.data_ptr(),
            is_finite.data_ptr(),
            torch.get_num_threads(),
        )
        return SampleOutput(token_ids=token_ids, is_finite=is_finite)

    return sample
