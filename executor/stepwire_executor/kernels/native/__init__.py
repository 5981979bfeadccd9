"""CPU kernels in C++ behind a plain C ABI, compiled once for the machine they run on."""

from stepwire_executor.kernels.native.build import KernelBuildError, build_library
from stepwire_executor.kernels.native.library import NativeLibrary, load_library

__all__ = ["KernelBuildError", "NativeLibrary", "build_library", "load_library"]
