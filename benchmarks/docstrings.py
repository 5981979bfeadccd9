"""English text that every Python brings along: the prose of its standard library's docstrings."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MIN_WORDS = 15
MIN_LETTERS = 0.92
"""Share of a paragraph's characters that are ASCII letters or white space."""


def paragraphs() -> Iterator[str]:
    """Paragraphs of prose, each once, in the order of modules and files.

    Modules are the public ones of sys.stdlib_module_names that are written in Python, with the
    files right below a package. A paragraph counts as prose where no line is indented, it has at
    least MIN_WORDS words and MIN_LETTERS letters, starts with a capital and ends with a full
    stop. So the text depends on the version of Python only.
    """
    seen: set[str] = set()
    for file in public_files():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(
                node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            ):
                continue
            docstring = ast.get_docstring(node) or ""
            for paragraph in docstring.split("\n\n"):
                if is_prose(paragraph) and paragraph not in seen:
                    seen.add(paragraph)
                    yield paragraph


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is English rather than a table, an example or a signature."""
    lines = paragraph.split("\n")
    num_letters = sum(c.isspace() or (c.isascii() and c.isalpha()) for c in paragraph)
    return (
        not any(line.startswith((" ", "\t")) for line in lines)
        and len(paragraph.split()) >= MIN_WORDS
        and num_letters >= MIN_LETTERS * len(paragraph)
        and paragraph[0].isupper()
        and paragraph.endswith(".")
    )


def public_files() -> Iterator[Path]:
    """Sources of the public modules, in the order of modules and files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_"):
            continue
        if (root / f"{name}.py").is_file():
            yield root / f"{name}.py"
        elif (root / name).is_dir():
            yield from sorted((root / name).glob("*.py"))
