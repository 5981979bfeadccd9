"""Loading a draft model: what must fit together, what is said of it, and what it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import structlog
from stepwire_executor import plan
from stepwire_executor.config import ExecutorConfig, parse_config
from stepwire_executor.errors import ModelLoadError
from stepwire_executor.load_status import ModelDescription
from stepwire_executor.loading import load_runner
from stepwire_executor.model.vocabulary import check_same_tokenizer
from stepwire_executor.speculation.loading import check_draft_model
from support.drafting import VOCAB_SIZE, write_tiny_model
from tokenizers import Tokenizer, models

TOKENS = [f"t{i}" for i in range(90)]


def write_tokenizer(directory: Path, tokens: list[str]) -> None:
    """A tokenizer of whole words."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0])).save(
        str(directory / "tokenizer.json")
    )


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("target"))


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    directory = tmp_path / "little"
    directory.mkdir()
    return write_tiny_model(directory, num_layers=1, num_key_value_heads=6)


def _load(
    target: Path, draft: Path | None, **settings: Any
) -> tuple[ModelDescription, list[tuple[str, float]]]:
    seen: list[tuple[str, float]] = []
    config = ExecutorConfig(
        model=str(target),
        speculative_model=None if draft is None else str(draft),
        **{"max_num_seqs": 2, "max_model_len": 64, "num_kv_blocks": 10, **settings},
    )
    _, description = load_runner(config, lambda phase, done: seen.append((phase, done)))
    return description, seen


def test_describe_says_what_the_draft_model_is_and_takes(target: Path, draft: Path) -> None:
    alone, _ = _load(target, None)
    both, _ = _load(target, draft)
    assert (alone.draft_model, both.draft_model) == ("", "little")
    assert (alone.draft_weight_bytes, alone.draft_kv_cache_bytes) == (0, 0)
    assert both.weight_bytes - both.draft_weight_bytes == alone.weight_bytes
    assert both.kv_cache_bytes - both.draft_kv_cache_bytes == alone.kv_cache_bytes
    # Keys and values of 10 blocks of 16 tokens, in one layer of 6 heads of 8 float32.
    assert both.draft_kv_cache_bytes == 2 * 10 * 16 * 6 * 8 * 4
    assert 0 < both.draft_weight_bytes < alone.weight_bytes


def test_the_fingerprint_tells_draft_models_apart(target: Path, draft: Path) -> None:
    prints = [_load(target, each)[0].model_fingerprint for each in (None, draft, target, draft)]
    assert len(set(prints)) == 3
    assert prints[1] == prints[3]


def test_progress_names_the_draft_models_phases_and_never_goes_back(
    target: Path, draft: Path
) -> None:
    _, seen = _load(target, draft)
    phases = list(dict.fromkeys(phase for phase, _ in seen))
    assert phases.index("compare the draft model's tokenizer") < phases.index("read weights")
    assert phases.index("pack weights") < phases.index("read weights of the draft model")
    assert phases.index("pack weights of the draft model") < phases.index("allocate KV cache")
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)


def test_a_pool_of_given_bytes_has_room_for_both_models_pages(target: Path, draft: Path) -> None:
    num_bytes = 1 << 20
    alone, _ = _load(target, None, num_kv_blocks=None, kv_cache_memory_bytes=num_bytes)
    both, _ = _load(target, draft, num_kv_blocks=None, kv_cache_memory_bytes=num_bytes)
    assert both.kv_cache_bytes <= num_bytes
    # The target has two layers of 3 heads, the draft model one of 6.
    assert both.num_blocks == alone.num_blocks // 2


@pytest.mark.parametrize(
    "settings",
    [{"max_num_batched_tokens": 1, "max_num_seqs": 1}, {"max_model_len": 1}, {"block_size": 1}],
)
def test_the_smallest_sizes_load(target: Path, draft: Path, settings: dict[str, int]) -> None:
    assert _load(target, draft, **settings)[0].draft_model == "little"


def test_shapes_load_with_made_up_weights(target: Path, draft: Path) -> None:
    (draft / "model.safetensors").unlink()
    assert _load(target, draft, load_format="dummy")[0].draft_model == "little"


def _refusal(target: Path, draft: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        check_draft_model(ExecutorConfig(model=str(target), speculative_model=str(draft)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_draft_model_with_another_vocabulary_is_refused_before_anything_is_loaded(
    target: Path, tmp_path: Path
) -> None:
    draft = write_tiny_model(tmp_path, vocab_size=VOCAB_SIZE + 1)
    seen: list[str] = []
    config = ExecutorConfig(model=str(target), speculative_model=str(draft))
    with pytest.raises(ModelLoadError, match="its vocabulary has 102 tokens, the model's 101"):
        load_runner(config, lambda phase, done: seen.append(phase))
    assert "read weights" not in seen


def test_a_draft_model_that_cannot_be_read_is_named(target: Path, draft: Path) -> None:
    assert _refusal(target, draft / "nowhere").startswith(
        "--speculative-model nowhere: the model 'nowhere' does not exist; give"
    )
    config = draft / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "model_type": "mamba"}))
    assert _refusal(target, draft).startswith(
        "--speculative-model little: config.json: model_type 'mamba' is not supported; supported:"
    )
    config.unlink()
    assert _refusal(target, draft).startswith("--speculative-model little: config.json is missing")
    config.write_text(json.dumps(values))
    (draft / "model.safetensors").unlink()
    assert _refusal(target, draft).startswith("--speculative-model little: the model directory ho")


@pytest.fixture
def tokenizers(tmp_path: Path, draft: Path, target: Path) -> tuple[Path, Path]:
    """Directories of the target and of the draft model with the same tokens."""
    own = tmp_path / "target"
    own.mkdir()
    for name in ("config.json", "model.safetensors"):
        (own / name).symlink_to(target / name)
    write_tokenizer(own, TOKENS)
    write_tokenizer(draft, TOKENS)
    return own, draft


def test_heads_of_the_same_tokenizer_may_be_padded_differently(
    tokenizers: tuple[Path, Path],
) -> None:
    own, draft = tokenizers
    write_tiny_model(draft, num_layers=1, vocab_size=96)
    # The same tokens, written down otherwise.
    tokenizer = json.loads((draft / "tokenizer.json").read_text())
    (draft / "tokenizer.json").write_text(json.dumps(tokenizer, indent=7))
    assert _load(own, draft)[0].vocab_size == VOCAB_SIZE


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        (TOKENS[:-1], "its tokenizer has 89 tokens, the model's 90: choose a draft model with the"),
        ([*TOKENS[:7], "x", *TOKENS[8:]], "its token 7 is 'x', the model's 't7': choose a draft"),
        ([TOKENS[1], TOKENS[0], *TOKENS[2:]], "its token 0 is 't1', the model's 't0': choose a d"),
    ],
)
def test_other_tokens_are_refused_though_the_heads_have_one_size(
    tokenizers: tuple[Path, Path], tokens: list[str], problem: str
) -> None:
    own, draft = tokenizers
    write_tokenizer(draft, tokens)
    assert _refusal(own, draft).startswith(f"--speculative-model little: {problem}")


def test_a_damaged_tokenizer_is_refused(tokenizers: tuple[Path, Path]) -> None:
    own, draft = tokenizers
    (draft / "tokenizer.json").write_text("{")
    assert "the tokenizer.json of 'little' is damaged" in _refusal(own, draft)


@pytest.mark.parametrize("without", [(0,), (1,), (0, 1)])
def test_without_a_tokenizer_the_sizes_are_compared_and_that_is_said(
    tokenizers: tuple[Path, Path], without: tuple[int, ...]
) -> None:
    for index in without:
        (tokenizers[index] / "tokenizer.json").unlink()
    sizes = {"vocab_size": 101, "draft_vocab_size": 101}
    with structlog.testing.capture_logs() as logs:
        check_same_tokenizer(*tokenizers, **sizes)
    reason = logs[0]["reason"]
    assert logs[0]["event"] == "draft_tokenizer_not_compared"
    assert ("with the model" in reason, "with the draft model" in reason) == (
        0 in without,
        1 in without,
    )
    with pytest.raises(ModelLoadError, match="its vocabulary has 102 tokens, the model's 101"):
        check_same_tokenizer(*tokenizers, **{**sizes, "draft_vocab_size": 102})


def test_the_tokenizer_inside_a_gguf_file_is_that_beside_it(
    smollm2_dir: Path, tmp_path: Path
) -> None:
    (file,) = smollm2_dir.glob("*.gguf")
    (tmp_path / "model.gguf").symlink_to(file)
    check_same_tokenizer(smollm2_dir, tmp_path, vocab_size=49152, draft_vocab_size=50000)
    assert not (tmp_path / "tokenizer.json").exists()
    draft = write_tiny_model(tmp_path / "tiny")
    write_tokenizer(draft, TOKENS)
    assert _refusal(tmp_path / "model.gguf", draft).startswith(
        "--speculative-model tiny: its tokenizer has 90 tokens, the model's 49152: choose"
    )


def test_the_flag_takes_a_path() -> None:
    arguments = ["--model", "m", "--speculative-model", "d"]
    assert parse_config(arguments, {}).speculative_model == "d"
    assert parse_config(arguments[:2], {}).speculative_model is None


def _plan(target: Path, draft: Path | None, **settings: Any) -> dict[str, Any]:
    return plan.plan_model(
        target,
        **{
            "dtype": "float32",
            "kv_cache_dtype": "auto",
            "block_size": 16,
            "max_num_batched_tokens": 256,
            "max_num_seqs": 2,
            "max_model_len": 64,
            "load_format": "auto",
            "speculative_model": draft,
            **settings,
        },
    )


def test_a_plan_counts_both_models_and_their_pages_as_loading_does(
    target: Path, draft: Path
) -> None:
    description, _ = _load(target, draft)
    planned, alone, own = _plan(target, draft), _plan(target, None), _plan(draft, None)
    assert planned["draft_model"] == "little"
    assert planned["weight_bytes"] == alone["weight_bytes"] + own["weight_bytes"]
    assert planned["draft_weight_bytes"] == own["weight_bytes"]
    assert planned["kv_bytes_per_block"] * 10 == description.kv_cache_bytes
    assert planned["draft_kv_bytes_per_block"] * 10 == description.draft_kv_cache_bytes
    assert planned["activation_bytes"] >= alone["activation_bytes"]
    assert "draft_model" not in alone


def test_every_rank_of_a_plan_holds_the_draft_model_whole(target: Path, draft: Path) -> None:
    planned = _plan(target, draft, tensor_parallel_size=2)
    alone = _plan(target, None, tensor_parallel_size=2)
    own = _plan(draft, None)
    assert planned["draft_weight_bytes"] == 2 * own["weight_bytes"]
    for rank, without in zip(planned["ranks"], alone["ranks"], strict=True):
        assert rank["weight_bytes"] == without["weight_bytes"] + own["weight_bytes"]
        assert rank["norm_bytes"] == without["norm_bytes"] + own["weight_bytes"]
        assert rank["kv_bytes_per_block"] == (
            without["kv_bytes_per_block"] + own["kv_bytes_per_block"]
        )


def test_a_plan_refuses_what_loading_refuses(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = write_tiny_model(tmp_path, vocab_size=VOCAB_SIZE + 1)
    assert plan.main(["--model", str(target), "--speculative-model", str(draft)]) == 1
    assert "its vocabulary has 102 tokens, the model's 101" in capsys.readouterr().err
