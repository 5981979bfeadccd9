"""A copy of a model with fewer layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from stepwire_executor.model.hf_config import read_hf_config
from support.drafting import load_tiny_model, write_tiny_model
from support.gguf_files import write_gguf
from support.model_steps import ModelSteps, SteppedSequence

from benchmarks.truncated_model import main, parse_layers, write_truncated_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def logits(path: Path) -> torch.Tensor:
    return ModelSteps(load_tiny_model(path)).step(
        [(SteppedSequence(list(PROMPT)), len(PROMPT))], all_rows=True
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = write_tiny_model(tmp_path / "source", num_layers=4)
    (path / "tokenizer.json").write_text("{}")
    return path


def test_a_copy_with_all_layers_is_the_model(source: Path, tmp_path: Path) -> None:
    write_truncated_model(source, tmp_path / "copy")
    assert torch.equal(logits(source), logits(tmp_path / "copy"))
    assert (tmp_path / "copy" / "tokenizer.json").is_file()


def test_a_copy_has_the_layers_that_were_asked_for_in_their_order(
    source: Path, tmp_path: Path
) -> None:
    assert main([str(source), str(tmp_path / "copy"), "--layers", "0,2-3"]) == 0
    assert read_hf_config(tmp_path / "copy").num_layers == 3
    whole = load_file(source / "model.safetensors")
    copy = load_file(tmp_path / "copy" / "model.safetensors")
    name = "model.layers.{}.mlp.up_proj.weight"
    for new, old in enumerate((0, 2, 3)):
        assert torch.equal(copy[name.format(new)], whole[name.format(old)])
    assert not torch.equal(logits(source), logits(tmp_path / "copy"))


def test_a_gguf_file_becomes_safetensors(source: Path, tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(source)
    write_gguf(tmp_path / "m.gguf", config, load_file(source / "model.safetensors"))
    write_truncated_model(tmp_path / "m.gguf", tmp_path / "copy")
    assert torch.equal(logits(source), logits(tmp_path / "copy"))


@pytest.mark.parametrize("layers", ["4", "2-1", "1,0", "0,0"])
def test_layers_that_cannot_be_are_refused_in_one_line(
    source: Path, tmp_path: Path, layers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(source), str(tmp_path / "copy"), "--layers", layers]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("layers must rise within 0..3")


def test_layers_are_written_as_ranges_and_numbers() -> None:
    assert parse_layers("0-3,7") == [0, 1, 2, 3, 7]
