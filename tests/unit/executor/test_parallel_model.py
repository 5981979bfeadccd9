"""Ranks that share a model compute what one rank computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from stepwire_executor.errors import ModelLoadError
from stepwire_executor.kernels import select_kernels
from stepwire_executor.model import LoadedModel, load_model
from stepwire_executor.parallel.process_group import ProcessGroup
from stepwire_executor.plan import plan_model
from support.gguf_files import write_gguf
from support.model_steps import CPU, ModelSteps, SteppedSequence
from support.rank_threads import run_ranks
from torch import Tensor

TOLERANCE = 1e-4
"""Where ranks outnumber KV heads, or kernels cannot add without rounding."""
COMMON: dict[str, Any] = {
    "vocab_size": 101,  # shares of a prime number of rows differ
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "eos_token_id": 2,
}
CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**COMMON),
    "llama-tied-biased": transformers.LlamaConfig(
        **COMMON, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "mistral-window": transformers.MistralConfig(**COMMON, head_dim=16, sliding_window=7),
    "qwen2-tied": transformers.Qwen2Config(
        **{**COMMON, "num_key_value_heads": 2}, tie_word_embeddings=True
    ),
    "qwen3": transformers.Qwen3Config(**{**COMMON, "num_key_value_heads": 2}, head_dim=16),
    "qwen3-one-kv-head": transformers.Qwen3Config(
        **{**COMMON, "num_key_value_heads": 1}, head_dim=16
    ),
}
PROMPTS = ([5, 17, 3, 88, 100, 0, 41, 9, 60], [7, 1], [99, 50, 51, 52, 20])


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module", params=CONFIGS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(CONFIGS[request.param], tmp_path_factory.mktemp(request.param))


def _network(config: transformers.PreTrainedConfig) -> Any:
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero as made; the sum must hold it once
            torch.nn.init.normal_(parameter)
    return model


def _save(config: transformers.PreTrainedConfig, path: Path) -> Path:
    _network(config).save_pretrained(path)
    return path


def _load(
    path: Path,
    group: ProcessGroup | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    load_format: Any = "auto",
) -> LoadedModel:
    more: dict[str, Any] = {} if group is None else {"group": group}
    kernels = select_kernels(CPU)
    return load_model(
        path, dtype=dtype, kernels=kernels, device=CPU, load_format=load_format, **more
    )


def _adds_exactly() -> bool:
    """Whether any number of ranks, up to that of KV heads, is to have the bits of one."""
    return select_kernels(CPU).summand_dtype == torch.float64


def _logits(model: LoadedModel) -> Tensor:
    """Of every prompt's every token: prefilled in two chunks together, then decoded singly."""
    steps = ModelSteps(model)
    sequences = [SteppedSequence(list(prompt)) for prompt in PROMPTS]
    rows = [
        steps.step([(sequences[0], 4), (sequences[1], 2), (sequences[2], 3)], all_rows=True),
        steps.step([(sequences[0], 4), (sequences[2], 2)], all_rows=True),
        steps.step([(sequences[0], 1)]),
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_logits_are_those_of_one_rank_and_the_same_bits_on_all(
    directory: Path, world_size: int
) -> None:
    whole = _load(directory)
    alone = _logits(whole)
    by_rank = run_ranks(world_size, lambda group: _logits(_load(directory, group)))
    assert by_rank[0].shape == alone.shape
    if world_size <= whole.config.num_kv_heads and _adds_exactly():
        assert torch.equal(by_rank[0], alone)
    assert (by_rank[0] - alone).abs().max() < TOLERANCE
    for other in by_rank[1:]:
        assert torch.equal(other, by_rank[0])


def test_summands_rounded_to_float32_would_show_the_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test of equal bits rests on; it could not tell otherwise."""
    if not _adds_exactly():
        pytest.skip("these kernels add float32")
    path = _save(CONFIGS["llama"], tmp_path)
    alone = _logits(_load(path))
    narrow = dataclasses.replace(select_kernels(CPU), summand_dtype=torch.float32)
    monkeypatch.setitem(globals(), "select_kernels", lambda device: narrow)
    by_rank = run_ranks(2, lambda group: _logits(_load(path, group)))
    assert not torch.equal(by_rank[0], alone)
    assert (by_rank[0] - alone).abs().max() < TOLERANCE


def test_a_row_does_not_depend_on_the_rows_beside_it(directory: Path) -> None:
    def differences(group: ProcessGroup) -> list[bool]:
        model = _load(directory, group)
        if not select_kernels(CPU).is_row_invariant:
            pytest.skip("these kernels are not row invariant")
        together = ModelSteps(model)
        sequences = [SteppedSequence(list(prompt)) for prompt in PROMPTS]
        rows = together.step([(each, len(each.token_ids)) for each in sequences])
        same = []
        for row, prompt in zip(rows, PROMPTS, strict=True):
            single = ModelSteps(model).step([(SteppedSequence(list(prompt)), len(prompt))])
            same.append(torch.equal(single[0], row))
        return same

    assert run_ranks(3, differences) == [[True] * len(PROMPTS)] * 3


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_weights_and_each_fingerprint_is_the_whole_models(
    directory: Path, world_size: int
) -> None:
    whole = _load(directory)
    models = run_ranks(world_size, lambda group: _load(directory, group))
    assert {model.fingerprint for model in models} == {whole.fingerprint}
    config = whole.config
    norms = 4 * (2 * config.num_layers + 1) * config.hidden_size
    if config.qk_norm:
        norms += 4 * 2 * config.num_layers * config.head_dim
    assert max(model.weight_bytes for model in models) < whole.weight_bytes
    if world_size <= config.num_kv_heads:  # else KV heads are held more than once
        # Layouts pad: a few rows or columns of a matrix that has less than a hundred.
        total = sum(model.weight_bytes - norms for model in models)
        assert total == pytest.approx(whole.weight_bytes - norms, rel=0.25)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_plan_of_each_rank_is_what_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int, has_bias: bool
) -> None:
    config = transformers.LlamaConfig(**COMMON, attention_bias=has_bias, mlp_bias=has_bias)
    path = _save(config, tmp_path)
    reference = select_kernels(CPU, "reference")  # which pad nothing
    monkeypatch.setitem(globals(), "select_kernels", lambda device: reference)
    models = run_ranks(world_size, lambda group: _load(path, group))
    planned = plan_model(
        path,
        dtype="float32",
        kv_cache_dtype="auto",
        block_size=16,
        max_num_batched_tokens=64,
        max_num_seqs=4,
        max_model_len=None,
        load_format="auto",
        tensor_parallel_size=world_size,
    )
    ranks = planned["ranks"]
    assert [each["weight_bytes"] for each in ranks] == [each.weight_bytes for each in models]
    assert planned["weight_bytes"] == sum(each.weight_bytes for each in models)
    norms = 2 * config.num_hidden_layers + 1
    assert {each["norm_bytes"] for each in ranks} == {4 * norms * config.hidden_size}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_the_bits_of_one_rank_as_well(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    directory = _save(CONFIGS["llama-tied-biased"], tmp_path)
    alone = _logits(_load(directory, dtype=dtype))
    first, second = run_ranks(2, lambda group: _logits(_load(directory, group, dtype=dtype)))
    assert torch.equal(first, second)
    if _adds_exactly():
        assert torch.equal(first, alone)
    assert (first - alone).abs().max() < 0.05 * alone.abs().max()


@pytest.mark.parametrize("matrix_type", ["F16", "Q4_1", "Q8_0"])
def test_gguf_files_are_shared_as_well(tmp_path: Path, matrix_type: str) -> None:
    wide = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6}
    config = transformers.LlamaConfig(**{**COMMON, **wide}, tie_word_embeddings=True)
    model = _network(config)
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    path = tmp_path / "model.gguf"
    write_gguf(path, config, state, matrix_type=gguf.GGMLQuantizationType[matrix_type])
    alone = _logits(_load(path))
    for world_size in (2, 3):
        by_rank = run_ranks(world_size, lambda group: _logits(_load(path, group)))
        assert (by_rank[0] - alone).abs().max() < TOLERANCE
        if _adds_exactly():
            assert torch.equal(by_rank[0], alone)


def test_dummy_weights_are_slices_of_the_same_whole(tmp_path: Path) -> None:
    directory = _save(CONFIGS["llama"], tmp_path)
    alone = _logits(_load(directory, load_format="dummy"))
    by_rank = run_ranks(2, lambda group: _logits(_load(directory, group, load_format="dummy")))
    assert (by_rank[0] - alone).abs().max() < TOLERANCE


def test_more_ranks_than_heads_are_refused(tmp_path: Path) -> None:
    directory = _save(CONFIGS["llama"], tmp_path)

    def problem(group: ProcessGroup) -> str:
        with pytest.raises(ModelLoadError) as caught:
            _load(directory, group)
        return str(caught.value)

    assert all("use at most 6" in text for text in run_ranks(7, problem))
