"""Centres of keys, which an fp8 cache takes from them before it rounds them."""

from __future__ import annotations

import torch
from torch import Tensor

from stepwire_executor.batch import StepBatch
from stepwire_executor.kv_cache import KVCache
from stepwire_executor.model.loader import LoadedModel

NUM_TOKENS = 512
"""Of the step that is computed: about a second for 135 million parameters on two cores."""
_BLOCK_SIZE = 16
_SEED = 0


@torch.inference_mode()
def measure_key_offsets(model: LoadedModel, device: torch.device) -> tuple[Tensor, ...]:
    """Compute one step of noise and return each layer's offset, float32 [num_kv_heads, head_dim].

    The offset lies halfway between the first key of the sequence and the mean of all. Where most
    heads leave their attention when they find nothing, the first key is small and differs from
    all others, so that the mean alone would enlarge the very rounding errors that count most
    (Xiao et al. 2023 name it a sink). Subtracting what all keys have in common: Zhang et al. 2024
    (SageAttention), section 4.2, there by the keys at hand, here by ones that depend on the model
    only: a key must not depend on what it is computed with.

    Token ids are pseudo-random; positions grow with the cube of their place up to the model's
    limit, so that what turns averages out, and short contexts, which are more common, weigh
    more. A model that computes no finite key has an offset of zero there. Takes memory for
    NUM_TOKENS unquantised keys and values and their activations, given back at the end.
    """
    config = model.config
    num_tokens = min(NUM_TOKENS, model.max_model_len)
    generator = torch.Generator().manual_seed(_SEED)
    place = torch.arange(num_tokens)
    stretch = (place.double() / max(1, num_tokens - 1)) ** 3
    positions = place + ((model.max_model_len - num_tokens) * stretch).long()
    num_blocks = -(-num_tokens // _BLOCK_SIZE)
    cache = KVCache(
        num_layers=config.num_layers,
        num_blocks=num_blocks,
        num_kv_heads=model.decoder.config.num_kv_heads,  # a rank has its own
        block_size=_BLOCK_SIZE,
        head_dim=config.head_dim,
        dtype=model.dtype,
        device=device,
    )
    batch = StepBatch(
        token_ids=torch.randint(config.vocab_size, (num_tokens,), generator=generator).to(device),
        positions=positions.to(device),
        slot_mapping=place.to(device),
        cu_seqlens_q=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([num_tokens], dtype=torch.int32, device=device),
        block_table=torch.arange(num_blocks, dtype=torch.int32, device=device).view(1, -1),
        logit_rows=torch.zeros(1, dtype=torch.int64, device=device),
        max_query_len=num_tokens,
    )
    model.decoder.hidden_states(batch, cache)
    return tuple(_offset(pages.key, num_tokens) for pages in cache.layers)


def _offset(pages: Tensor, num_tokens: int) -> Tensor:
    """pages: [num_blocks, num_kv_heads, block_size, head_dim], filled from the first slot on."""
    keys = pages.transpose(0, 1).flatten(1, 2)[:, :num_tokens].float()
    offset = (keys[:, 0] + keys.mean(dim=1)) / 2
    return torch.where(offset.isfinite(), offset, 0.0).contiguous()
