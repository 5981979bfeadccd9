"""The table of weights in integers."""

from __future__ import annotations

from benchmarks import quantization


def test_the_table_has_a_row_a_variant() -> None:
    figure = {
        "weight_bytes": 88_000_000.0,
        "weight_bytes_ratio": 0.27,
        "layer_bytes_ratio": 0.275,
        "perplexity": 20.0,
        "perplexity_ratio": 1.002,
        "second_perplexity": 21.0,
        "second_perplexity_ratio": 1.003,
        "agreement": 0.97,
    }
    names = [variant.name for variant in quantization.VARIANTS]
    shown = quantization.markdown(
        {
            "by_weights": dict.fromkeys(names, figure),
            "num_scored_tokens": 20_000,
            "num_prompts": 20,
            "num_output_tokens": 64,
        }
    )
    assert len(set(names)) == len(names)
    assert all(f"| {name} |" in shown for name in names)
    assert all(cell in shown for cell in ("88.0", "27.0%", "27.5%", "+0.20%", "97.0%", "1,280"))
