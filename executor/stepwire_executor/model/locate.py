"""What a model path means."""

from __future__ import annotations

from pathlib import Path

from stepwire_executor.errors import ModelLoadError

SHAPES = Path(__file__).parent / "shapes"
"""Configs of well-known models, one folder each, to measure without their weights."""


def find_shape(path: Path) -> Path:
    """What a model path means where weights are made up: a path, or the name of a known shape.

    Raises ModelLoadError where it is neither.
    """
    names = sorted(each.name for each in SHAPES.iterdir() if each.is_dir())
    if path.exists():
        return path
    if str(path) in names:
        return SHAPES / path
    raise ModelLoadError(
        f"the model {path.name!r} does not exist; give a directory, a .gguf file or one of the "
        f"shapes {', '.join(names)}"
    )


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a model path means; None for a Hugging Face directory.

    Raises ModelLoadError where there is no such path, or more than one file to choose from.
    """
    if path.is_file() or path.suffix == ".gguf":
        return path
    if not path.is_dir():
        raise ModelLoadError(
            f"the model {path.name!r} does not exist; give a directory or a .gguf file"
        )
    if (path / "config.json").is_file():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise ModelLoadError(
            f"the model directory holds {len(found)} GGUF files; give the path of one of them"
        )
    return found[0] if found else None
