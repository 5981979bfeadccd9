"""Loading: progress, fingerprints, dtypes, memory plans, and rows that stay what they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from stepwire_executor import plan
from stepwire_executor.errors import ModelLoadError
from stepwire_executor.kernels import Kernels, select_kernels
from stepwire_executor.kv_cache import KVCache
from stepwire_executor.model import LoadedModel, load_model
from stepwire_executor.model.hf_config import read_hf_config
from stepwire_executor.model.loader import open_checkpoint
from stepwire_executor.model.locate import SHAPES
from stepwire_executor.model.weights.dummy import DummyWeights
from support.model_steps import CPU, ModelSteps, SteppedSequence

CONFIG = transformers.Qwen2Config(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.2,
    eos_token_id=7,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen2")
    torch.manual_seed(3)
    transformers.Qwen2ForCausalLM(CONFIG).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(params=["reference", "auto"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return select_kernels(CPU, backend=request.param)


def _load(path: Path, kernels: Kernels, **options: Any) -> LoadedModel:
    return load_model(path, kernels=kernels, device=CPU, **{"dtype": "auto", **options})


def test_progress_names_its_phases_and_never_goes_back(directory: Path, kernels: Kernels) -> None:
    seen: list[tuple[str, float]] = []
    _load(directory, kernels, on_progress=lambda phase, done: seen.append((phase, done)))
    assert list(dict.fromkeys(phase for phase, _ in seen)) == ["read weights", "pack weights"]
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)


def test_an_error_of_the_progress_callback_ends_the_load(directory: Path, kernels: Kernels) -> None:
    class GaveUpError(Exception):
        pass

    def give_up(_phase: str, fraction: float) -> None:
        if fraction > 0.5:
            raise GaveUpError

    with pytest.raises(GaveUpError):
        _load(directory, kernels, on_progress=give_up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_computes_close_to_float32(
    directory: Path, kernels: Kernels, dtype: torch.dtype
) -> None:
    tokens = list(range(5, 105, 3))
    work = [(SteppedSequence(tokens), len(tokens))]
    model = _load(directory, kernels, dtype=dtype)
    logits = ModelSteps(model).step(work, all_rows=True)
    exact = ModelSteps(_load(directory, kernels, dtype=torch.float32)).step(
        [(SteppedSequence(tokens), len(tokens))], all_rows=True
    )
    assert logits.dtype == torch.float32
    assert model.dtype == dtype
    error = (logits - exact).norm() / exact.norm()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]


def test_auto_dtype_is_the_checkpoints(directory: Path, kernels: Kernels) -> None:
    assert _load(directory, kernels).dtype == torch.bfloat16


def test_a_checkpoint_whose_config_names_no_dtype_keeps_its_tensors_dtype(
    directory: Path, kernels: Kernels, tmp_path: Path
) -> None:
    values = json.loads((directory / "config.json").read_text())
    del values["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    tensors = load_file(directory / "model.safetensors")
    save_file({k: t.half() for k, t in tensors.items()}, tmp_path / "model.safetensors")
    assert _load(tmp_path, kernels).dtype == torch.float16


def test_the_fingerprint_changes_with_dtype_weights_and_config(
    directory: Path, kernels: Kernels, tmp_path: Path
) -> None:
    original = _load(directory, kernels).fingerprint
    assert _load(directory, kernels).fingerprint == original
    assert _load(directory, kernels, dtype=torch.float32).fingerprint != original

    values = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file(tensors, tmp_path / "model.safetensors")
    assert _load(tmp_path, kernels).fingerprint == original
    save_file(
        {**tensors, "model.norm.weight": torch.zeros(64).bfloat16()}, tmp_path / "model.safetensors"
    )
    assert _load(tmp_path, kernels).fingerprint != original
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**values, "rms_norm_eps": 1e-4}))
    assert _load(tmp_path, kernels).fingerprint != original


def test_end_tokens_come_from_both_configs(
    directory: Path, kernels: Kernels, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(directory / name)
    generation = {"eos_token_id": [9, 7], "bos_token_id": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    config = _load(tmp_path, kernels).config
    assert (config.eos_token_ids, config.bos_token_id) == ((9, 7), 3)


def test_dummy_weights_need_a_config_only_and_repeat(
    directory: Path, kernels: Kernels, tmp_path: Path
) -> None:
    (tmp_path / "config.json").symlink_to(directory / "config.json")
    logits = [
        ModelSteps(_load(tmp_path, kernels, load_format="dummy")).step(
            [(SteppedSequence([1, 2, 3]), 3)]
        )
        for _ in range(2)
    ]
    assert torch.equal(*logits)
    assert logits[0].isfinite().all()
    assert logits[0].std() > 0


def test_dummy_weights_of_a_row_do_not_depend_on_where_reading_starts() -> None:
    config = read_hf_config(SHAPES / "qwen2.5-0.5b")
    name = "model.layers.3.mlp.down_proj.weight"
    weights = DummyWeights(config)
    whole = torch.empty(config.hidden_size, config.intermediate_size)
    weights.load_into(name, whole)
    part = torch.empty(40, config.intermediate_size)
    weights.load_into(name, part, 300)
    assert torch.equal(part, whole[300:340])
    block = torch.empty(4, 30)
    weights.load_into(name, block, 300, 17)
    assert torch.equal(block, whole[300:304, 17:47])
    assert whole.unique(dim=0).shape == whole.shape
    assert 0.015 < whole.std() < 0.025


@pytest.mark.parametrize(
    ("shape", "num_parameters"),
    # As the models' authors state them.
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-0.5b", 494_032_768),
    ],
)
def test_shapes_of_known_models_have_their_number_of_parameters(
    shape: str, num_parameters: int
) -> None:
    config, source = open_checkpoint(Path(shape), "dummy")
    assert sum(math.prod(info.shape) for info in source.tensors.values()) == num_parameters
    assert config.checkpoint_dtype == "bfloat16"


def test_an_unknown_shape_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ModelLoadError, match=r"llama-3\.1-8b, qwen2\.5-0\.5b, qwen2\.5-7b"):
        open_checkpoint(Path("gpt-5"), "dummy")
    with pytest.raises(ModelLoadError, match="does not exist"):
        open_checkpoint(Path("llama-3.1-8b"))


def test_a_gpus_plan_counts_its_pool_and_a_tied_table_once() -> None:
    plans = {}
    for memory in (None, 80 << 30):
        plans[memory] = plan.plan_model(
            Path("qwen2.5-0.5b"),
            dtype="auto",
            kv_cache_dtype="auto",
            block_size=None,
            max_num_batched_tokens=2048,
            max_num_seqs=None,
            max_model_len=None,
            load_format="dummy",
            gpu_memory_bytes=memory,
        )
    cpu, gpu = plans[None], plans[80 << 30]
    assert gpu["weight_bytes"] == 2 * gpu["num_parameters"] < cpu["weight_bytes"]
    assert (cpu["block_size"], gpu["block_size"]) == (16, 64)
    assert "num_kv_blocks" not in cpu
    taken = gpu["weight_bytes"] + gpu["activation_bytes"] + gpu["kv_cache_bytes"]
    assert 0 <= 0.9 * (80 << 30) - taken < gpu["kv_bytes_per_block"]


def test_a_step_without_logit_rows_writes_kv_and_returns_none(
    directory: Path, kernels: Kernels
) -> None:
    model = _load(directory, kernels, dtype=torch.float32)
    tokens = [3, 99, 4, 15, 92, 65, 35]
    steps, silent = ModelSteps(model), ModelSteps(model)
    sequence, same = SteppedSequence(list(tokens)), SteppedSequence(list(tokens))
    steps.step([(sequence, 5)])
    assert silent.step([(same, 5)], no_rows=True).shape == (0, CONFIG.vocab_size)
    assert torch.equal(steps.step([(sequence, 2)]), silent.step([(same, 2)]))


def test_native_rows_do_not_depend_on_their_neighbours_bit_for_bit(directory: Path) -> None:
    kernels = select_kernels(CPU, backend="auto")
    if not kernels.is_row_invariant:
        pytest.skip("no compiler here: the torch references do not promise this")
    model = _load(directory, kernels, dtype=torch.float32)
    tokens = torch.randint(128, (5, 40), generator=torch.Generator().manual_seed(1)).tolist()

    together = ModelSteps(model)
    sequences = [SteppedSequence(list(ids)) for ids in tokens]
    together.step([(s, 10 + i) for i, s in enumerate(sequences)])
    for _ in range(5):
        mixed = together.step([(s, 1 + i) for i, s in enumerate(sequences)])
    for i, ids in enumerate(tokens):
        computed = sequences[i].num_computed_tokens
        alone = ModelSteps(model).step([(SteppedSequence(ids), computed)])
        assert torch.equal(mixed[i], alone[0]), i


def test_the_memory_plan_is_what_loading_takes(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = select_kernels(CPU, backend="reference")
    for dtype in ("bfloat16", "float32"):
        for kv_cache_dtype in ("auto", "fp8"):
            flags = ["--dtype", dtype, "--kv-cache-dtype", kv_cache_dtype, "--block-size", "8"]
            assert plan.main(["--model", str(directory), "--json", *flags]) == 0
            printed = json.loads(capsys.readouterr().out)
            model = _load(directory, kernels, dtype=getattr(torch, dtype))
            assert printed["weight_bytes"] == model.weight_bytes
            cache = KVCache(
                num_layers=3,
                num_blocks=5,
                num_kv_heads=2,
                block_size=8,
                head_dim=16,
                dtype=getattr(torch, printed["kv_cache_dtype"]),
                device=CPU,
            )
            assert printed["kv_bytes_per_block"] * 5 == cache.num_bytes
            assert printed["kv_bytes_per_token"] * 8 == printed["kv_bytes_per_block"]
            assert printed["max_position_embeddings"] == 256


def test_more_tokens_and_sequences_need_more_activations(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = []
    for tokens, seqs in ((128, 8), (2048, 8), (2048, 4096)):
        flags = ["--max-num-batched-tokens", str(tokens), "--max-num-seqs", str(seqs)]
        assert plan.main(["--model", str(directory), "--json", *flags]) == 0
        sizes.append(json.loads(capsys.readouterr().out)["activation_bytes"])
    assert sizes[0] < sizes[1] < sizes[2]


def test_a_plan_of_a_bad_model_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(["--model", str(tmp_path / "absent")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_real_model_s_plan_is_read_from_headers(
    smollm2_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(["--model", str(smollm2_dir), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["num_parameters"] == 134_515_008
    assert printed["dtype"] == "bfloat16"
    assert printed["kv_bytes_per_token"] == 2 * 30 * 3 * 64 * 2
