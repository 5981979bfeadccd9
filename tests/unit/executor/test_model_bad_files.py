"""A model that cannot be served is refused with one line that names the fix."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from stepwire_executor.errors import ModelLoadError
from stepwire_executor.kernels import select_kernels
from stepwire_executor.model import load_model
from stepwire_executor.model.loader import LoadFormat
from stepwire_executor.model.weights.gguf_file import GGUFFile
from support.gguf_files import write_gguf
from support.model_steps import CPU

CONFIG = transformers.LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def hf_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hf")
    transformers.LlamaForCausalLM(CONFIG).save_pretrained(directory, max_shard_size="20KB")
    return directory


@pytest.fixture
def hf_dir(hf_original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(hf_original, tmp_path / "model")


@pytest.fixture(scope="module")
def gguf_original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    model = transformers.LlamaForCausalLM(CONFIG)
    write_gguf(path, CONFIG, dict(model.state_dict()), matrix_type=gguf.GGMLQuantizationType.Q4_1)
    return path.read_bytes()


def load(path: Path, *, load_format: LoadFormat = "auto", max_model_len: int | None = None) -> Any:
    return load_model(
        path,
        dtype="auto",
        kernels=select_kernels(CPU, backend="reference"),
        device=CPU,
        load_format=load_format,
        max_model_len=max_model_len,
    )


def assert_refused(path: Path, *words: str, **options: Any) -> None:
    with pytest.raises(ModelLoadError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path.parent) not in message
    for word in words:
        assert word in message, message


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_originals_load(hf_dir: Path, tmp_path: Path, gguf_original: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_original)
    assert load(path).config.num_layers == load(hf_dir).config.num_layers == 2


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent", "'absent' does not exist")
    assert_refused(tmp_path / "absent.gguf", "absent.gguf does not exist")


def test_an_empty_directory_or_file_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, "config.json is missing", "GGUF")
    (tmp_path / "empty.gguf").touch()
    assert_refused(tmp_path / "empty.gguf", "empty.gguf is empty", "download it again")


def test_two_gguf_files_in_a_directory_are_refused(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    assert_refused(tmp_path, "2 GGUF files", "give the path of one")


@pytest.mark.parametrize("twentieth", range(20))
def test_a_gguf_file_cut_anywhere_is_refused(
    tmp_path: Path, gguf_original: bytes, twentieth: int
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_original[: len(gguf_original) * twentieth // 20 + 1])
    assert_refused(path, "model.gguf")


def test_a_gguf_header_cut_at_any_byte_is_refused(tmp_path: Path, gguf_original: bytes) -> None:
    path = tmp_path / "model.gguf"
    data_start = len(gguf_original) - sum(
        tensor.num_bytes for tensor in GGUFFile(_write(path, gguf_original)).tensors.values()
    )
    for length in range(1, data_start, 7):
        with pytest.raises(ModelLoadError, match=r"model\.gguf"):
            GGUFFile(_write(path, gguf_original[:length]))


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_a_gguf_file_with_flipped_bytes_loads_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, gguf_original: bytes, data: st.DataObject
) -> None:
    """No other exception, and no allocation beyond the file's size."""
    content = bytearray(gguf_original)
    header = 2_000  # the rest is weights, where every byte means something
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
    path = _write(tmp_path_factory.getbasetemp() / "flipped.gguf", bytes(content))
    with contextlib.suppress(ModelLoadError):
        load(path, max_model_len=16)


@pytest.mark.parametrize(
    ("offset", "field", "word"),
    [
        (0, b"GGML", "not a GGUF file"),
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack(">I", 3), "little-endian"),
        (8, struct.pack("<Q", 1 << 62), "claims"),
        (16, struct.pack("<Q", 1 << 62), "claims"),
        (24, struct.pack("<Q", 1 << 62), "claims"),
    ],
    ids=["magic", "version", "big-endian", "tensor-count", "pair-count", "string-length"],
)
def test_a_wrong_gguf_header_is_refused_before_anything_is_allocated(
    tmp_path: Path, gguf_original: bytes, offset: int, field: bytes, word: str
) -> None:
    content = gguf_original[:offset] + field + gguf_original[offset + len(field) :]
    assert_refused(_write(tmp_path / "model.gguf", content), "model.gguf", word)


def test_an_unsupported_tensor_type_names_file_tensor_type_and_the_supported_ones(
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.gguf"
    state = dict(transformers.LlamaForCausalLM(CONFIG).state_dict())
    name = "model.layers.1.mlp.up_proj.weight"
    del state[name]
    # GGUFWriter marks int8 arrays as type I8.
    extra = {"blk.1.ffn_up.weight": np.zeros((32, 32), np.int8)}
    write_gguf(path, CONFIG, state, extra_tensors=extra)
    assert_refused(path, "model.gguf", "'blk.1.ffn_up.weight'", "type I8", "Q4_0", "Q4_K", "F16")


def test_a_gguf_file_of_another_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_refused(path, "'mamba'", "llama, qwen2, qwen3")


def test_a_gguf_file_with_a_missing_or_misshapen_or_foreign_tensor_is_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.gguf"
    state = dict(transformers.LlamaForCausalLM(CONFIG).state_dict())
    missing = {name: t for name, t in state.items() if "layers.1.mlp.down" not in name}
    write_gguf(path, CONFIG, missing)
    assert_refused(path, "'model.layers.1.mlp.down_proj.weight' is missing")

    misshapen = {**state, "model.norm.weight": torch.ones(31)}
    write_gguf(path, CONFIG, misshapen)
    assert_refused(path, "'model.norm.weight'", "[31]", "[32]")

    extra = {"blk.0.ffn_gate_exps.weight": np.zeros((2, 2), np.float32)}
    write_gguf(path, CONFIG, state, extra_tensors=extra)
    assert_refused(path, "'blk.0.ffn_gate_exps.weight'", "dense models")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, ["'gpt2'", "llama, mistral, qwen2, qwen3"]),
        ({"model_type": None}, ["model_type"]),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
            ["'longrope'", "default, linear, llama3, yarn"],
        ),
        ({"rope_parameters": {"rope_type": "llama3"}}, ["low_freq_factor is missing"]),
        ({"rope_parameters": {"rope_theta": 1}}, ["rope_theta must be above 1"]),
        ({"rope_parameters": "yarn"}, ["rope_parameters must be an object"]),
        ({"hidden_act": "gelu"}, ["'gelu'", "only silu"]),
        ({"quantization_config": {"quant_method": "hqq"}}, ["'hqq'", "GGUF"]),
        ({"hidden_size": "32"}, ["hidden_size must be a positive integer, is '32'"]),
        ({"hidden_size": 0}, ["hidden_size must be a positive integer"]),
        ({"hidden_size": 1 << 40}, ["hidden_size must be a positive integer"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps must be a positive number"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads must be a divisor"]),
        ({"vocab_size": None}, ["vocab_size is missing"]),
        ({"head_dim": 15}, ["rotates 15 of 15", "even"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id must be a token id"]),
        ({"intermediate_size": 64}, ["mlp.gate_proj.weight' has shape [32, 32]", "[64, 32]"]),
        ({"num_hidden_layers": 1 << 30}, ["num_hidden_layers", "4096"]),
        ({"num_hidden_layers": 3}, ["'model.layers.2.input_layernorm.weight' is missing"]),
        ({"num_hidden_layers": 1}, ["'model.layers.1.", "same source"]),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else None,
)
def test_a_config_that_cannot_be_served_is_refused(
    hf_dir: Path, changes: dict[str, Any], words: list[str]
) -> None:
    edit_config(hf_dir, **changes)
    assert_refused(hf_dir, *words)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_not_a_json_object_is_refused(hf_dir: Path, content: bytes) -> None:
    (hf_dir / "config.json").write_bytes(content)
    assert_refused(hf_dir, "config.json")


def test_a_missing_or_cut_shard_is_named(hf_dir: Path) -> None:
    shard = sorted(hf_dir.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    for kept in (0, 5, 8, 100, len(content) // 2, len(content) - 1):
        shard.write_bytes(content[:kept])
        assert_refused(hf_dir, shard.name, "download it again")
    shard.unlink()
    assert_refused(hf_dir, shard.name, "missing")


@pytest.mark.parametrize(
    ("index", "word"),
    [
        ("{}", "weight_map"),
        ("nonsense", "weight_map"),
        ('{"weight_map": {"a": "../other/model.safetensors"}}', "outside the model directory"),
    ],
)
def test_a_wrong_index_is_refused(hf_dir: Path, index: str, word: str) -> None:
    (hf_dir / "model.safetensors.index.json").write_text(index)
    assert_refused(hf_dir, "model.safetensors.index.json", word)


def test_an_index_that_points_to_the_wrong_shard_is_refused(hf_dir: Path) -> None:
    path = hf_dir / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names = sorted(set(index["weight_map"].values()))
    moved = next(name for name, file in index["weight_map"].items() if file == names[0])
    index["weight_map"][moved] = names[1]
    path.write_text(json.dumps(index))
    assert_refused(hf_dir, names[1], moved)


def test_a_safetensors_type_that_is_not_supported_is_refused(hf_dir: Path) -> None:
    shard = sorted(hf_dir.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = min(tensors)
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, shard)
    assert_refused(hf_dir, name, "I8", "BF16")


def test_a_directory_without_weights_is_refused_unless_they_are_dummies(hf_dir: Path) -> None:
    for path in hf_dir.glob("model*"):
        path.unlink()
    assert_refused(hf_dir, "model.safetensors", ".gguf")
    assert load(hf_dir, load_format="dummy").weight_bytes > 0


def test_a_pickled_checkpoint_is_never_read(hf_dir: Path) -> None:
    for path in hf_dir.glob("model*"):
        path.unlink()
    torch.save({}, hf_dir / "pytorch_model.bin")
    assert_refused(hf_dir, "model.safetensors")


@pytest.mark.parametrize("max_model_len", [0, -1, 65])
def test_a_context_that_the_model_lacks_is_refused(hf_dir: Path, max_model_len: int) -> None:
    assert_refused(hf_dir, "max_model_len", "64", max_model_len=max_model_len)


def _write(path: Path, content: bytes) -> Path:
    path.unlink(missing_ok=True)  # a mapped file must not change under its readers
    path.write_bytes(content)
    return path
