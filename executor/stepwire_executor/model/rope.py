"""Tables of cosines and sines for rotary position embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepwire_executor.model.config import (
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    RopeConfig,
    YarnScaling,
)


def cos_sin_table(rope: RopeConfig, num_positions: int, device: torch.device) -> Tensor:
    """Cosines, then sines, of every position: [num_positions, rotary_dim] float32."""
    frequencies = inverse_frequencies(rope)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    amplitude = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0
    return torch.cat((angles.cos() * amplitude, angles.sin() * amplitude), dim=1).to(device)


def inverse_frequencies(rope: RopeConfig) -> Tensor:
    """Radians a position turns each pair of elements: [rotary_dim / 2] float32."""
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    frequencies = 1.0 / (rope.theta**exponents)
    match rope.scaling:
        case None:
            return frequencies
        case LinearScaling(factor=factor):
            return frequencies / factor
        case FrequencyFactors(factors=factors):
            return frequencies / torch.tensor(factors, dtype=torch.float32)
        case Llama3Scaling() as scaling:
            return _llama3(frequencies, scaling)
        case YarnScaling() as scaling:
            return _yarn(frequencies, rope, scaling)


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Stretch by wavelength; the share kept falls linearly in the number of turns."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def _yarn(frequencies: Tensor, rope: RopeConfig, scaling: YarnScaling) -> Tensor:
    """Peng et al. 2023, section 3.2: a ramp over dimensions from kept to stretched."""

    def dimension_that_turns(num_turns: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (num_turns * 2 * math.pi)
        return rope.rotary_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low = dimension_that_turns(scaling.beta_fast)
    high = dimension_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    width = high - low if high != low else 0.001  # an empty ramp is a step
    stretched = ((torch.arange(rope.rotary_dim // 2) - low) / width).clamp(0, 1)
    return frequencies * (1 - stretched) + frequencies / scaling.factor * stretched
