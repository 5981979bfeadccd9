"""The kernels under test: the best that this machine has, the AVX2 ones, the references."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from stepwire_executor.kernels import Kernels
from stepwire_executor.kernels.native import KernelBuildError, NativeLibrary, load_library
from stepwire_executor.kernels.select import native_kernels, reference_kernels


@pytest.fixture(autouse=True)
def _random_state() -> Iterator[None]:
    """Give every test the same numbers and leave the number of threads as it was."""
    num_threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(num_threads)


def _load(variant: str) -> NativeLibrary:
    try:
        best = load_library()
        if variant == "native":
            return best
        if best.features == "avx2":
            pytest.skip("the machine's best is AVX2, which is tested already")
        return load_library(extra_flags=("-march=haswell",))
    except KernelBuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=["native", "avx2"])
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    """The compiled library, for this machine and for one with AVX2 only."""
    return _load(request.param)


@pytest.fixture(scope="session")
def native(library: NativeLibrary) -> Kernels:
    """The native kernels, for this machine and for one with AVX2 only."""
    return native_kernels(library)


@pytest.fixture(scope="session", params=["native", "avx2", "reference"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Every set of kernels."""
    if request.param == "reference":
        return reference_kernels()
    return native_kernels(_load(request.param))
