"""Every section of gpu-check runs under Triton's interpreter, and faults do not pass it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.triton_interpreter import IS_INTERPRETED
from torch import Tensor

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="rehearses without a GPU")

from benchmarks.gpu import (  # noqa: E402 # after the skip
    attention_invariance,
    attention_prefill,
    linear_check,
    paged_sequences,
    rows_check,
    sampler_check,
    worker,
)
from benchmarks.gpu.paged_sequences import AttentionCase, PagedSequences  # noqa: E402
from benchmarks.gpu.report import Outcome, exit_status  # noqa: E402
from benchmarks.gpu.sections import SECTIONS  # noqa: E402
from benchmarks.gpu.targets import TARGETS  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Waking a second thread costs more than these sizes take."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def rehearse(name: str, *, is_warm_up: bool = False) -> Outcome:
    return worker.run(
        {
            "section": name,
            "is_rehearsal": True,
            "is_warm_up": is_warm_up,
            "seed": 5,
            "ceilings": {"copy_bytes_per_s": 1e9},
            "timeout_s": 100.0,
        }
    )


@functools.cache
def keys_of(name: str) -> frozenset[str]:
    """The targets that a section fills; rehearsed once a process."""
    outcome = rehearse(name)
    assert exit_status([outcome]) == 0, outcome.rows
    assert outcome.rows
    assert outcome.figures
    assert all(row.verdict != "skipped" for row in outcome.rows)
    return frozenset(row.key for row in outcome.rows if row.key is not None)


_NAMES = [section.name for section in SECTIONS]


@pytest.mark.parametrize("name", _NAMES)
def test_a_section_runs_and_finds_nothing_wrong(name: str) -> None:
    keys_of(name)


def test_the_sections_together_fill_the_table_of_targets() -> None:
    assert set(TARGETS) == frozenset().union(*(keys_of(name) for name in _NAMES))


def wrong_rows(name: str) -> list[str]:
    return [row.what for row in rehearse(name).rows if row.verdict == "FAIL"]


def changed(function: Callable[..., Any], change: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        return change(function(*arguments, **options), *arguments)

    return run


def test_a_row_that_is_a_little_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def bend(out: Tensor, *_: Any) -> Tensor:
        out[3] *= 1.05
        return out

    monkeypatch.setattr(paged_sequences, "attend", changed(paged_sequences.attend, bend))
    assert wrong_rows("attention-bf16")


def test_rows_of_attention_that_change_with_the_batch_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def depend(out: Tensor, *_: Any) -> Tensor:
        return out if len(out) == 1 else out * (1 + 2.0**-10)

    monkeypatch.setattr(paged_sequences, "attend", changed(paged_sequences.attend, depend))
    for name in ("check_chunks", "check_placement"):
        monkeypatch.setattr(attention_invariance._Rows, name, lambda *_: None)
    assert len(wrong_rows("attention-bits")) == 2


def test_unwritten_results_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(out: Tensor, x: Tensor, *_: Any) -> Tensor:
        unwritten = torch.empty_like(out)
        unwritten[:-1] = out[:-1]
        return unwritten

    monkeypatch.setattr(linear_check, "linear", changed(linear_check.linear, leave))
    assert len(wrong_rows("linear")) == 2


def test_keys_written_without_their_scale_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(_: None, *arguments: Any) -> None:
        pages = arguments[4]
        if pages.key_scale is not None:
            pages.key_scale.fill_(1.0)

    monkeypatch.setattr(
        rows_check, "rope_and_write_kv", changed(rows_check.rope_and_write_kv, forget)
    )
    assert wrong_rows("rope-and-kv-write")


def test_a_sampler_that_is_off_by_one_id_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def shift(chosen: tuple[Tensor, Tensor], *_: Any) -> tuple[Tensor, Tensor]:
        token_ids, is_finite = chosen
        return (token_ids - 1).clamp(min=0), is_finite

    monkeypatch.setattr(sampler_check, "choose", changed(sampler_check.choose, shift))
    monkeypatch.setattr(sampler_check, "_companies", lambda *_: [])
    monkeypatch.setattr(sampler_check, "_reports_unsamplable", lambda _: True)
    assert len(wrong_rows("sampler")) == 2


def test_an_error_is_the_sections_failure_and_names_no_path() -> None:
    def broken(bench: object) -> Outcome:
        raise RuntimeError("first line\nsecond line")

    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr("benchmarks.gpu.ceilings.measure", broken)
        outcome = rehearse("ceilings")
    (row,) = outcome.rows
    assert (row.verdict, row.figure) == ("FAIL", "RuntimeError: first line")


def test_the_references_agree_with_each_other() -> None:
    case = AttentionCase(
        num_kv_heads=2, group=3, head_dim=8, block_size=4, dtype=torch.float32,
        page_dtype=torch.float32,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    sequences = PagedSequences(case, [13], generator=generator)
    (query,) = sequences.queries(generator)
    expected = sequences.expected(query, (0, 0, 13))
    place = torch.arange(13)
    table = sequences.batch([(0, 0, 13)]).block_table[0].long()
    key, value = (
        x[table[place // 4], :, place % 4].repeat_interleave(3, dim=1).transpose(0, 1).unsqueeze(0)
        for x in (sequences.pages.key, sequences.pages.value)
    )
    naive = attention_prefill.naive_attention(
        query.transpose(0, 1).unsqueeze(0), key, value, scale=case.scale
    )
    torch.testing.assert_close(naive[0].transpose(0, 1), expected.float())


def test_blocks_may_move_without_a_change_of_what_they_hold() -> None:
    case = AttentionCase(
        num_kv_heads=1, group=1, head_dim=16, block_size=4, dtype=torch.float16,
        page_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    sequences = PagedSequences(case, [9, 30], generator=generator)
    moved = sequences.moved(generator)
    queries = sequences.queries(generator)
    for chunk in ((0, 3, 9), (1, 0, 30)):
        rows = queries[chunk[0]][chunk[1] : chunk[2]]
        assert torch.equal(sequences.expected(rows, chunk), moved.expected(rows, chunk))
    chunks = [(0, 8, 9), (1, 29, 30)]
    assert not torch.equal(sequences.batch(chunks).block_table, moved.batch(chunks).block_table)
