"""Text to ids and back with the model's own files."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepwire_scheduler import tokenizer as tokenizer_module
from stepwire_scheduler.errors import (
    ChatTemplateError,
    QueueFullError,
    TextTooLongError,
    TokenizerFilesError,
)
from stepwire_scheduler.tokenizer import Tokenizer, load_tokenizer, wait_for_tokenizer
from support.scheduler_fakes import tiny_tokenizer
from support.scheduler_tokenizers import (
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    write_tokenizer,
)
from tokenizers import processors


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("model"))


LONG = "The quick brown fox. " * 100


@pytest.mark.parametrize("text", ["", "hello", "Grüße 北京 👩‍👩‍👧", LONG])
async def test_text_round_trips(tmp_path: Path, text: str) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    token_ids = await tokenizer.encode_text(text, max_tokens=9_999)
    assert token_ids == byte_level_tokenizer().encode(text).ids
    assert await tokenizer.decode(token_ids, skip_special_tokens=False) == text


async def test_special_tokens_are_left_out_where_asked(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    token_ids = await tokenizer.encode_text("a<|im_end|>b", max_tokens=9_999)
    assert await tokenizer.decode(token_ids, skip_special_tokens=True) == "ab"
    assert await tokenizer.decode(token_ids, skip_special_tokens=False) == "a<|im_end|>b"


async def test_chat_is_rendered_with_the_models_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    token_ids = await tokenizer.encode_chat([{"role": "user", "content": "hi"}], max_tokens=9_999)
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert token_ids == byte_level_tokenizer().encode(rendered).ids


def with_bos() -> object:
    tokenizer = byte_fallback_tokenizer().__class__.from_str(byte_fallback_tokenizer().to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("adds_bos_itself", "config", "expected_bos"),
    [
        (True, {}, 1),
        (True, {"add_bos_token": True}, 1),
        (True, {"add_bos_token": False}, 0),
        (False, {}, 0),
        (False, {"add_bos_token": True}, 1),
        (False, {"add_bos_token": True, "bos_token": {"content": "<s>"}}, 1),
    ],
)
async def test_bos_is_added_as_the_model_says_and_once(
    tmp_path: Path, adds_bos_itself: bool, config: dict[str, object], expected_bos: int
) -> None:
    source = with_bos() if adds_bos_itself else byte_fallback_tokenizer()
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, source, **({"bos_token": "<s>"} | config)))
    assert (await tokenizer.encode_text("abc", max_tokens=9_999)).count(1) == expected_bos
    assert (await tokenizer.encode_text("<s>abc", max_tokens=9_999)).count(1) == 1


async def test_a_template_that_writes_bos_gets_one(tmp_path: Path) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}"
    tokenizer = load_tokenizer(
        write_tokenizer(tmp_path, with_bos(), bos_token="<s>", chat_template=template)
    )
    messages = [{"role": "user", "content": "abc"}]
    assert (await tokenizer.encode_chat(messages, max_tokens=9_999)).count(1) == 1


async def test_a_model_without_a_template_says_what_to_send(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path, chat_template=None)
    assert not tokenizer.has_chat_template
    with pytest.raises(ChatTemplateError, match="send text or token_ids"):
        await tokenizer.encode_chat([{"role": "user", "content": "hi"}], max_tokens=9_999)


async def test_a_template_can_be_a_file_or_one_of_several(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "named"}]
    tokenizer = tiny_tokenizer(tmp_path, chat_template=several)
    ids = await tokenizer.encode_chat([], max_tokens=9_999)
    assert await tokenizer.decode(ids, skip_special_tokens=False) == "named"
    (tmp_path / "chat_template.jinja").write_text("from file")
    ids = await load_tokenizer(tmp_path).encode_chat([], max_tokens=9_999)
    assert await tokenizer.decode(ids, skip_special_tokens=False) == "from file"


def test_a_broken_template_leaves_the_tokenizer_usable(tmp_path: Path) -> None:
    assert not tiny_tokenizer(tmp_path, chat_template="{% for %}").has_chat_template


async def test_truncation_of_training_is_not_applied(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    document = json.loads(file.read_text())
    document["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    file.write_text(json.dumps(document))
    assert len(await load_tokenizer(tmp_path).encode_text("abcdefgh" * 4, max_tokens=9_999)) > 4


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", "{", "is not a tokenizer"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "is not a tokenizer"),
        ("tokenizer_config.json", "[]", "cannot be read"),
        ("tokenizer_config.json", "{", "cannot be read"),
    ],
)
def test_unusable_files_are_one_line_that_names_the_fix(
    tmp_path: Path, name: str, content: str | bytes | None, named: str
) -> None:
    write_tokenizer(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(TokenizerFilesError, match=named) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in caught.value.message


def test_a_gguf_files_tokenizer_stands_beside_it(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.touch()
    for path in (model, tmp_path):
        with pytest.raises(TokenizerFilesError, match="tokenizer_conversion"):
            load_tokenizer(path)
    write_tokenizer(tmp_path)
    assert load_tokenizer(model).vocab_size == load_tokenizer(tmp_path).vocab_size
    (tmp_path / "tokenizer_config.json").unlink()  # not written yet
    with pytest.raises(TokenizerFilesError, match=r"tokenizer_config\.json is missing"):
        load_tokenizer(model)


async def test_files_may_appear_later(tmp_path: Path) -> None:
    waiting = asyncio.create_task(wait_for_tokenizer(tmp_path / "m", interval_s=0.01))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "tokenizer.json").write_text('{"half a')
    await asyncio.sleep(0.05)
    assert not waiting.done()
    write_tokenizer(tmp_path / "m")
    assert (await asyncio.wait_for(waiting, 10)).has_chat_template


async def test_pending_work_is_bounded_and_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_module, "_MAX_PENDING", 3)
    tokenizer = tiny_tokenizer(tmp_path)
    jobs = [asyncio.create_task(tokenizer.encode_text(LONG, max_tokens=9_999)) for _ in range(10)]
    results = await asyncio.gather(*jobs, return_exceptions=True)
    assert sum(isinstance(result, QueueFullError) for result in results) == 7
    await asyncio.sleep(0)
    assert await tokenizer.encode_text(LONG, max_tokens=9_999)


async def test_encoding_that_is_cancelled_gives_its_place_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_module, "_MAX_PENDING", 1)
    tokenizer = tiny_tokenizer(tmp_path)
    job = asyncio.create_task(tokenizer.encode_text(LONG * 50, max_tokens=9_999))
    await asyncio.sleep(0)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    async with asyncio.timeout(10):
        while True:
            try:
                assert await tokenizer.encode_text(LONG, max_tokens=9_999)
            except QueueFullError:
                await asyncio.sleep(0.01)
            else:
                break


@pytest.mark.parametrize("text", [LONG * 50, "é" * 20_000, "x" * 20_000, "\x1f" * 500_000])
async def test_a_text_that_is_much_too_long_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(TextTooLongError, match="more than 64 tokens"):
        await tiny_tokenizer(tmp_path).encode_text(text, max_tokens=64)


pieces = st.sampled_from(["a", "the ", "é", "<|im_start|>", "    ", "quick brown "])


@given(text=st.lists(pieces, max_size=60).map("".join), slack=st.integers(0, 5))
def test_a_text_that_fits_is_never_refused(tiny: Tokenizer, text: str, slack: int) -> None:
    expected = byte_level_tokenizer().encode(text).ids
    encoded = asyncio.run(tiny.encode_text(text, max_tokens=len(expected) + slack))
    assert encoded == expected
