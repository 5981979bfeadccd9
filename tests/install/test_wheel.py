"""The wheel holds what each process needs, and the scheduler's side runs without the executor."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "protos", "scheduler", "executor", "client")


def _build(folder: Path, *, without: str | None = None) -> Path:
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if name == without:
            continue
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", str(folder), str(source)], check=True
    )
    return next(folder.glob("stepwire-*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def scheduler_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(tmp_path_factory.mktemp("scheduler_wheel"), without="executor")


def test_the_wheel_holds_every_module_of_the_tree_and_nothing_else(wheel: Path) -> None:
    held = {
        name
        for name in zipfile.ZipFile(wheel).namelist()
        if not name.split("/")[0].endswith(".dist-info")
    }
    expected = {
        path.relative_to(ROOT / top).as_posix()
        for top in ("protos", "scheduler", "executor", "client")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == expected
    assert "stepwire/__init__.py" not in held, "stepwire is a namespace"


def test_a_wheel_without_the_executor_still_serves(scheduler_wheel: Path, tmp_path: Path) -> None:
    """What the scheduler's image installs."""
    with zipfile.ZipFile(scheduler_wheel) as archive:
        assert not any(name.startswith("stepwire_executor") for name in archive.namelist())
        archive.extractall(tmp_path)
    code = (
        "import stepwire_scheduler.server, stepwire_client, sys;"
        f"assert stepwire_scheduler.server.__file__.startswith({str(tmp_path)!r});"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)


def test_the_command_is_an_entry_point(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "stepwire = stepwire_client.cli.__main__:main" in archive.read(name).decode()
