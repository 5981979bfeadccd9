"""Building the native kernels, and what happens where they cannot be built."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from stepwire_executor.kernels import select_kernels
from stepwire_executor.kernels.native import KernelBuildError, build_library, load_library
from stepwire_executor.kernels.native import build as build_module
from structlog.testing import capture_logs

CPU = torch.device("cpu")


def make_compiler(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("variable", ["PATH", "CXX"])
def test_without_a_compiler_the_references_are_chosen_with_one_warning(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "nothing-here"))
    with capture_logs() as logs:
        kernels = select_kernels(CPU, cache_dir=tmp_path)
    assert kernels.name == "reference"
    assert not kernels.is_row_invariant
    [log] = logs
    assert log["log_level"] == "warning"
    assert "CXX" in log["reason"]
    with pytest.raises(KernelBuildError, match="CXX"):
        select_kernels(CPU, "native", cache_dir=tmp_path)


def test_a_compiler_that_fails_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    make_compiler(compiler, "echo 'fatal error: omp.h is missing' >&2; exit 1")
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(KernelBuildError, match=r"omp\.h is missing") as caught:
        build_library(cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_cpu_without_avx2_gets_the_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    make_compiler(compiler, "echo '#define __SSE2__ 1'")
    monkeypatch.setenv("CXX", str(compiler))
    with capture_logs() as logs:
        assert select_kernels(CPU, cache_dir=tmp_path).name == "reference"
    assert "AVX2" in logs[0]["reason"]


def test_a_cache_that_cannot_be_written_names_the_fix(tmp_path: Path) -> None:
    _require_compiler()
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(KernelBuildError, match="STEPWIRE_CACHE"):
        build_library(cache_dir=blocked / "native")


def test_references_are_there_on_request() -> None:
    with capture_logs() as logs:
        assert select_kernels(CPU, "reference").name == "reference"
    assert logs == []


def test_native_kernels_are_refused_on_other_devices() -> None:
    with pytest.raises(KernelBuildError, match="CPU only"):
        select_kernels(torch.device("meta"), "native")
    assert select_kernels(torch.device("meta")).name == "reference"


def test_concurrent_builds_leave_one_library_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _require_compiler()
    # One small source instead of the real ones: what is tested is how the result is put in place.
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(build_module, "SOURCE_DIR", sources)
    cache = tmp_path / "cache"
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(build_library(cache_dir=cache).path))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4
    assert list(cache.iterdir()) == [paths[0]]
    (sources / "one.cpp").write_text('extern "C" int one() { return 2; }\n')
    assert build_library(cache_dir=cache).path != paths[0]


def test_a_library_that_does_not_load_names_the_fix(tmp_path: Path) -> None:
    _require_compiler()
    path = build_library().path
    (tmp_path / path.name).write_bytes(b"not a library")
    with pytest.raises(KernelBuildError, match="clear the cache"):
        load_library(cache_dir=tmp_path)


def _require_compiler() -> None:
    try:
        build_library()
    except KernelBuildError as error:
        pytest.skip(str(error))
