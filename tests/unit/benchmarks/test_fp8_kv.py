"""The text that the fp8 cache is judged by, and how it is cut."""

from __future__ import annotations

import itertools

import pytest

from benchmarks import docstrings, fp8_kv

PROSE = "This is a sentence that tells of something in plain English words and then it ends here."


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        (PROSE, True),
        (PROSE.removesuffix("."), False),
        (PROSE.lower(), False),
        ("Too short to say much.", False),
        (f"{PROSE}\n    with_code(1)\n{PROSE}", False),
        ("A table: " + "1 | 2 | " * 20 + PROSE, False),
    ],
)
def test_prose_is_told_from_code_and_tables(paragraph: str, expected: bool) -> None:
    assert docstrings.is_prose(paragraph) is expected


def test_the_text_is_the_same_each_time_and_repeats_nothing() -> None:
    first, second = (list(itertools.islice(docstrings.paragraphs(), 50)) for _ in range(2))
    assert first == second
    assert len(set(first)) == 50


def test_windows_score_each_token_once() -> None:
    windows = fp8_kv.Windows(num_tokens=10, num_context=4)
    text = list(range(40))
    cut = windows.cut(text, 4)
    assert [token for window in cut for token in window[4:]] == list(range(4, 28))
    with pytest.raises(ValueError, match="too few"):
        windows.cut(text, 7)


def test_the_table_has_a_row_a_cache() -> None:
    figure = {
        "bytes_per_token": 100.0,
        "bytes_per_token_ratio": 0.516,
        "perplexity": 20.0,
        "perplexity_ratio": 1.002,
        "second_perplexity": 21.0,
        "second_perplexity_ratio": 1.003,
        "agreement": 0.97,
    }
    caches = (fp8_kv.BFLOAT16, fp8_kv.FP8, fp8_kv.FP8_STATIC)
    shown = fp8_kv.markdown(
        {
            "by_cache": dict.fromkeys(caches, figure),
            "num_scored_tokens": 20_000,
            "num_prompts": 20,
            "num_output_tokens": 64,
        }
    )
    assert all(f"| {name} |" in shown for name in caches)
    assert all(cell in shown for cell in ("51.6%", "+0.20%", "+0.30%", "97.0%", "1,280"))
