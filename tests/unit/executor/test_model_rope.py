"""Rotary frequencies equal transformers' for any parameters."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from stepwire_executor.model.config import YarnScaling
from stepwire_executor.model.hf_config import read_hf_config
from stepwire_executor.model.rope import cos_sin_table, inverse_frequencies
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

CPU = torch.device("cpu")
FACTORS = st.floats(1.0, 64.0)
CONTEXTS = st.sampled_from([32, 512, 4096, 8192])
SCALINGS = st.one_of(
    st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": FACTORS}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": FACTORS,
            "low_freq_factor": st.floats(0.5, 2.0),
            "high_freq_factor": st.floats(2.5, 16.0),
            "original_max_position_embeddings": CONTEXTS,
        }
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("yarn"),
            "factor": FACTORS,
            "original_max_position_embeddings": CONTEXTS,
        },
        optional={
            "attention_factor": st.floats(0.5, 2.0),
            "beta_fast": st.floats(4.0, 64.0),
            "beta_slow": st.floats(0.5, 3.0),
            "mscale": st.floats(0.5, 2.0),
            "mscale_all_dim": st.floats(0.5, 2.0),
            "truncate": st.booleans(),
        },
    ),
)


@settings(max_examples=150, deadline=None)
@given(
    scaling=SCALINGS,
    theta=st.sampled_from([10_000.0, 100_000.0, 500_000.0, 1_000_000.0]),
    head_dim=st.sampled_from([8, 64, 80, 128]),
)
def test_scaled_frequencies_equal_transformers(
    scaling: dict[str, Any], theta: float, head_dim: int
) -> None:
    config = transformers.LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=1 << 17,
        rope_parameters={"rope_theta": theta, **scaling},
    )
    with tempfile.TemporaryDirectory() as directory:
        config_path = Path(directory) / "config.json"
        config_path.write_text(json.dumps(config.to_dict()))
        rope = read_hf_config(Path(directory)).rope

    frequencies, amplitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, CPU)

    torch.testing.assert_close(inverse_frequencies(rope), frequencies, rtol=2e-5, atol=0)
    if isinstance(rope.scaling, YarnScaling):
        assert abs(rope.scaling.attention_factor - amplitude) < 1e-9
    table = cos_sin_table(rope, 3, CPU)
    assert table.shape == (3, head_dim)
    torch.testing.assert_close(table[2, : head_dim // 2], (2 * frequencies).cos() * amplitude)
    torch.testing.assert_close(table[2, head_dim // 2 :], (2 * frequencies).sin() * amplitude)
