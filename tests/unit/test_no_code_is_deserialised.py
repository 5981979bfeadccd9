"""Nothing that arrives, and no file, becomes code: the ways to do that are not in the packages."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("scheduler", "executor", "client", "protos")
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "__import__"}
LOADERS = {("torch", "load"), ("torch", "hub"), ("yaml", "load"), ("numpy", "load"), ("np", "load")}
KEYWORDS = {"allow_pickle", "trust_remote_code", "weights_only"}


def offences(source: str) -> Iterator[str]:
    """What a module does that could run what it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.partition(".")[0] in MODULES:
                yield module
            yield from (f"{module}.{a.name}" for a in node.names if (module, a.name) in LOADERS)
        elif isinstance(node, ast.Name) and node.id in CALLS:
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in LOADERS:
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg in KEYWORDS:
            yield str(node.arg)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_can_run_what_it_reads(package: str) -> None:
    paths = [path for path in (ROOT / package).rglob("*.py") if "_pb2" not in path.name]
    found = {
        str(path.relative_to(ROOT)): list(offences(path.read_text(encoding="utf-8")))
        for path in paths
    }
    assert paths or package == "protos"
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import marshal as m",
        "torch.load(path)",
        "from torch import load",
        "eval(text)",
        "run = exec",
        "numpy.load(path, mmap_mode='r')",
        "f(allow_pickle=True)",
        "def f():\n    import dill",
    ],
)
def test_each_way_is_seen(source: str) -> None:
    assert list(offences(source))
