"""The tokenizer inside a GGUF file becomes the Hugging Face files that the scheduler reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
import transformers
from stepwire_executor.errors import ModelLoadError
from stepwire_executor.model.tokenizer_conversion import build_tokenizer, convert_gguf_tokenizer
from stepwire_executor.model.weights.gguf_file import GGUFFile
from tokenizers import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces and a\ttab ",
    "don't we'll it's I'M",
    "1234567890 3.14 2026-01-31",
    "def f(x):\n    return {'a': [x, 1]}  # code\n\n\n",
    "Zürich, naïve, Ωμέγα, Привет, שלום, नमस्ते, 漢字かな, 한국어",
    "👩‍👩‍👧‍👦 🇪🇸 👍🏽 e\u0301",
    "\r\n\r\n mixed \u00a0 \u2003 blanks \u200b",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|im_start| >not special",
]


@pytest.fixture(scope="module")
def smollm2(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding_and_decoding(smollm2: Tokenizer, text: str) -> None:
    ids = smollm2.encode(text).ids
    assert smollm2.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_are_one_id_and_can_be_left_out(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("<|im_start|>user\nhi<|im_end|>\n").ids
    assert ids[0] == 1
    assert ids.count(2) == 1
    assert smollm2.decode(ids) == "user\nhi\n"


def test_digits_are_split_one_by_one(smollm2: Tokenizer) -> None:
    assert smollm2.encode("12345").tokens == list("12345")


def test_nothing_is_added_around_a_text_where_the_file_says_so(smollm2: Tokenizer) -> None:
    assert smollm2.encode("hi").ids == smollm2.encode("hi", add_special_tokens=False).ids


def test_the_real_model_s_config_renders_a_chat(smollm2_dir: Path) -> None:
    config = json.loads((smollm2_dir / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert config["add_bos_token"] is False
    prompt = jinja2.Template(config["chat_template"]).render(
        messages=[{"role": "user", "content": "Hi"}], add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_every_token_of_the_real_model_keeps_its_id(smollm2_dir: Path, smollm2: Tokenizer) -> None:
    tokens = GGUFFile(next(smollm2_dir.glob("*.gguf"))).metadata["tokenizer.ggml.tokens"]
    assert smollm2.get_vocab_size() == len(tokens)
    assert [smollm2.id_to_token(i) for i in range(len(tokens))] == tokens


def _write(path: Path, *, model: str, tokens: list[tuple[str, int]], **values: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    for key, value in values.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_tensor("x", np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


BYTE_LETTERS = [chr(letter) for letter in (*range(0x21, 0x7F), *range(0xA1, 0xAD))]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "12 3", "123 4", "l l", "' ll", "Ġ Ġ"]
BPE_TOKENS = [
    *((letter, NORMAL) for letter in [*BYTE_LETTERS, "Ġ", "Ċ", "č", "ĉ"]),
    *((merge.replace(" ", ""), NORMAL) for merge in MERGES),
    ("12345", NORMAL),
    ("<s>", CONTROL),
    ("</s>", CONTROL),
    ("<tool>", USER_DEFINED),
]
BPE_IDS = {token: i for i, (token, _) in enumerate(BPE_TOKENS)}


def _bpe(path: Path, pre: str, **values: Any) -> Tokenizer:
    _write(
        path,
        model="gpt2",
        tokens=BPE_TOKENS,
        tokenizer_pre=pre,
        token_merges=MERGES,
        bos_token_id=BPE_IDS["<s>"],
        eos_token_id=BPE_IDS["</s>"],
        **values,
    )
    return build_tokenizer(GGUFFile(path))[0]


@pytest.mark.parametrize(
    ("pre", "text", "tokens"),
    [
        ("gpt-2", "the 12345", ["t", "he", "Ġ", "1234", "5"]),
        ("default", "1234", ["1234"]),
        ("smollm", "the 1234", ["t", "he", "Ġ", "1", "2", "3", "4"]),
        ("qwen2", "1234", ["1", "2", "3", "4"]),
        ("llama-bpe", "1234", ["123", "4"]),
        ("llama-bpe", "x\n\n the", ["x", "Ċ", "Ċ", "Ġthe"]),
        ("qwen2", "I'll", ["I", "'ll"]),
    ],
)
def test_each_pre_tokenizer_cuts_text_its_own_way(
    tmp_path: Path, pre: str, text: str, tokens: list[str]
) -> None:
    tokenizer = _bpe(tmp_path / "model.gguf", pre)
    assert tokenizer.encode(text, add_special_tokens=False).tokens == tokens


def test_user_defined_tokens_are_whole_but_not_special(tmp_path: Path) -> None:
    tokenizer = _bpe(tmp_path / "model.gguf", "gpt-2")
    ids = tokenizer.encode("the<tool>the").ids
    assert BPE_IDS["<tool>"] in ids
    assert tokenizer.decode(ids) == "the<tool>the"


def test_bos_and_eos_are_added_where_the_file_says_so(tmp_path: Path) -> None:
    bos, eos = BPE_IDS["<s>"], BPE_IDS["</s>"]
    for pre, flags, first, last in (
        ("gpt-2", {}, False, False),
        ("llama-bpe", {}, True, False),
        ("llama-bpe", {"add_bos_token": False}, False, False),
        ("qwen2", {"add_bos_token": True, "add_eos_token": True}, True, True),
    ):
        tokenizer = _bpe(tmp_path / "model.gguf", pre, **flags)
        ids = tokenizer.encode("the").ids
        assert (ids[0] == bos, ids[-1] == eos) == (first, last), (pre, flags)
        assert not {bos, eos} & set(tokenizer.encode("the", add_special_tokens=False).ids)


PIECES = [("▁a", -1.0), ("ab", -2.0), ("▁ab", -3.0), ("bc", -0.5), ("abc", -4.0), ("▁", -9.0)]
SPM_TOKENS = [
    ("<unk>", UNKNOWN),
    ("<s>", CONTROL),
    ("</s>", CONTROL),
    *((f"<0x{byte:02X}>", BYTE) for byte in range(256)),
    *((piece, NORMAL) for piece, _ in PIECES),
    *((letter, NORMAL) for letter in "abc"),
]


def _spm(path: Path, **values: Any) -> Tokenizer:
    scores = [0.0] * 259 + [score for _, score in PIECES] + [-10.0] * 3
    _write(
        path,
        model="llama",
        tokens=SPM_TOKENS,
        token_scores=scores,
        bos_token_id=1,
        eos_token_id=2,
        unk_token_id=0,
        **values,
    )
    return build_tokenizer(GGUFFile(path))[0]


def test_sentencepiece_merges_the_best_scored_pair_first(tmp_path: Path) -> None:
    tokenizer = _spm(tmp_path / "model.gguf")
    # "bc" scores above "▁a", "▁a" above "ab": the order of merges decides the cut.
    assert tokenizer.encode("abc").tokens == ["<s>", "▁a", "bc"]
    assert tokenizer.encode("ab").tokens == ["<s>", "▁ab"]


@pytest.mark.parametrize("text", ["abc ab", " a", "é 漢 👍", "a\nb", "ab  c"])
def test_sentencepiece_text_survives_through_bytes(tmp_path: Path, text: str) -> None:
    tokenizer = _spm(tmp_path / "model.gguf")
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_sentencepiece_adds_no_space_where_the_file_says_so(tmp_path: Path) -> None:
    tokenizer = _spm(tmp_path / "model.gguf", add_space_prefix=False)
    assert tokenizer.encode("ab", add_special_tokens=False).tokens == ["ab"]
    assert tokenizer.decode(tokenizer.encode(" ab").ids) == " ab"


def test_files_are_written_once_and_transformers_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    _bpe(path, "llama-bpe", chat_template="{{ messages[0].content }}")
    target = convert_gguf_tokenizer(path)
    assert target == tmp_path / "tokenizer.json"
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.bos_token == "<s>"
    assert tokenizer("the").input_ids[0] == BPE_IDS["<s>"]
    assert tokenizer.apply_chat_template([{"content": "x"}], tokenize=False) == "x"

    target.write_text("kept")
    assert convert_gguf_tokenizer(path).read_text() == "kept"
    assert {file.name for file in tmp_path.iterdir()} == {
        "model.gguf",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_what_cannot_be_converted_is_refused_with_a_way_out(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(ModelLoadError, match=r"'tekken' is not supported.*put the model's"):
        _bpe(path, "tekken")
    _write(path, model="t5", tokens=BPE_TOKENS)
    with pytest.raises(ModelLoadError, match=r"'t5' is not supported.*put the model's"):
        convert_gguf_tokenizer(path)
    _write(path, model="gpt2", tokens=BPE_TOKENS, token_merges=["no such"])
    with pytest.raises(ModelLoadError, match="merges do not fit"):
        convert_gguf_tokenizer(path)
    _write(path, model="gpt2", tokens=BPE_TOKENS, token_merges=["alone"])
    with pytest.raises(ModelLoadError, match="merges"):
        convert_gguf_tokenizer(path)
    _write(path, model="gpt2", tokens=BPE_TOKENS, token_merges=MERGES, bos_token_id=10**6)
    with pytest.raises(ModelLoadError, match="bos_token_id must be below"):
        convert_gguf_tokenizer(path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_the_command_imports_no_torch_and_prints_the_path(tmp_path: Path) -> None:
    _bpe(tmp_path / "model.gguf", "gpt-2")
    code = (
        "import sys; from stepwire_executor.model import tokenizer_conversion as t; "
        "code = t.main(); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(tmp_path / "tokenizer.json")

    absent = [sys.executable, "-c", code, str(tmp_path / "absent" / "model.gguf")]
    done = subprocess.run(absent, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "does not exist" in done.stderr
    assert "Traceback" not in done.stderr
