"""Compiling the native kernels once a machine, and finding them again.

The shared library's name is a hash of everything that its bits depend on: the sources, the
flags, and the compiler's predefined macros, which tell its version and the CPU's features. So
a cache may be shared by machines, and a stale library is never loaded.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCE_DIR = Path(__file__).parent / "src"
COMPILERS = ("c++", "g++", "clang++")
REQUIRED_MACROS = ("__AVX2__", "__FMA__", "__F16C__")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fPIC",
    "-fopenmp",
    # Multiplications and additions fuse only where the source says so: a compiler that fuses in
    # one copy of a loop and not in another would make a row's bits depend on the batch.
    "-ffp-contract=off",
    "-fno-math-errno",
)
_TIMEOUT_S = 300.0


class KernelBuildError(RuntimeError):
    """The native kernels cannot be built or loaded here; the message names the fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeBuild:
    """A compiled library."""

    path: Path
    """Shared object in the cache."""
    features: str
    """"avx512_bf16", "avx512" or "avx2"."""


def default_cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Return where compiled code lives: $STEPWIRE_CACHE/native or ~/.cache/stepwire/native."""
    root = (os.environ if environ is None else environ).get("STEPWIRE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "stepwire") / "native"


def find_compiler() -> str:
    """Return the C++ compiler: $CXX, else the first of COMPILERS on the path.

    Raises KernelBuildError if there is none.
    """
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise KernelBuildError(
        f"CXX names no program: {wanted}"
        if wanted
        else "no C++ compiler found: install g++ or clang++, or set CXX"
    )


def build_library(*, cache_dir: Path | None = None, extra_flags: Sequence[str] = ()) -> NativeBuild:
    """Return the compiled kernels, compiling them unless the cache has them.

    Concurrent builds are safe: each compiles in a directory of its own and renames the result.
    Raises KernelBuildError without a compiler, without AVX2, or if compilation fails.
    """
    compiler = find_compiler()
    flags = (*FLAGS, *extra_flags)
    macros = _run([compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])
    defined = {line.split()[1] for line in macros.splitlines() if line.startswith("#define ")}
    missing = [macro for macro in REQUIRED_MACROS if macro not in defined]
    if missing:
        raise KernelBuildError("the native kernels need a CPU with AVX2, FMA and F16C")
    sources = sorted(SOURCE_DIR.iterdir())
    # Clang's OpenMP code needs Clang's own runtime, and a second pool of threads with it.
    openmp = None if "__clang__" in defined else _torch_openmp()
    digest = hashlib.sha256("\0".join((*flags, openmp or "", macros)).encode())
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    directory = default_cache_dir() if cache_dir is None else cache_dir
    path = directory / f"{digest.hexdigest()[:32]}.so"
    if not path.exists():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _compile(compiler, flags, sources, openmp, path)
        except OSError as error:
            raise KernelBuildError(
                f"cannot write the native kernels: {error.strerror}; "
                "set STEPWIRE_CACHE to a writable directory"
            ) from error
    return NativeBuild(path=path, features=_features(defined))


def _features(macros: set[str]) -> str:
    needed = {"__AVX512F__", "__AVX512BW__", "__AVX512DQ__", "__AVX512VL__"}
    if not needed <= macros:
        return "avx2"
    return "avx512_bf16" if "__AVX512BF16__" in macros else "avx512"


def _torch_openmp() -> str | None:
    """Return the OpenMP runtime that torch brings, so that both share one pool of threads."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return str(found[0]) if found else None


def _compile(
    compiler: str, flags: Sequence[str], sources: Sequence[Path], openmp: str | None, path: Path
) -> None:
    """Compile every source at once, link, and move the result to path."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as build:
        objects: list[str] = []
        running: list[subprocess.Popen[str]] = []
        try:
            for source in sources:
                if source.suffix == ".cpp":
                    objects.append(str(Path(build) / f"{source.stem}.o"))
                    command = [compiler, *flags, "-c", str(source), "-o", objects[-1]]
                    running.append(
                        subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: S603
                    )
            for process in running:
                _, errors = process.communicate(timeout=_TIMEOUT_S)
                if process.returncode:
                    raise KernelBuildError(_failure(errors))
        except subprocess.TimeoutExpired as error:
            raise KernelBuildError(f"compilation took over {_TIMEOUT_S:.0f} s") from error
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        linked = str(Path(build) / path.name)
        runtime = [openmp] if openmp else ["-fopenmp"]
        _run([compiler, "-shared", *objects, *runtime, "-o", linked])
        os.replace(linked, path)


def _run(command: Sequence[str]) -> str:
    """Return a command's output; raises KernelBuildError if it fails."""
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelBuildError(f"cannot run the C++ compiler: {error}") from error
    if done.returncode:
        raise KernelBuildError(_failure(done.stderr))
    return done.stdout


def _failure(errors: str) -> str:
    """Boil a compiler's output down to its first error."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")
    return f"the C++ compiler failed: {first}; a current g++ or clang++ with OpenMP is needed"
