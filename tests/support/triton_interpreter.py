"""Where Triton kernels are tested: on a GPU, or by Triton's interpreter where there is none.

Triton reads TRITON_INTERPRET once, when it is imported, so tests/conftest.py sets it before
anything imports triton.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import TypeVar

import pytest
import torch
from stepwire_executor.batch import StepBatch
from stepwire_executor.kv_cache import KVPages
from torch import Tensor

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu")
"""Where the tensors of these tests live."""
DTYPES = [torch.float32, torch.float16, *([] if IS_INTERPRETED else [torch.bfloat16])]
"""What activations are tested in: the interpreter truncates to bfloat16 instead of rounding."""

requires_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (IS_INTERPRETED or DEVICE.type == "cuda"),
    reason="needs triton, and a GPU or TRITON_INTERPRET=1",
)
"""For modules that run kernels: pytestmark = requires_triton."""

Data = TypeVar("Data", StepBatch, KVPages)


def on_device(data: Data) -> Data:
    """Return data with every tensor on the device of the tests."""
    fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    return dataclasses.replace(
        data,
        **{name: x.to(DEVICE) for name, x in fields.items() if isinstance(x, Tensor)},
    )
