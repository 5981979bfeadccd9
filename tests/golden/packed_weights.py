"""Writes packed_weights.safetensors: small matrices as each format's own library packs them.

Beside the stored tensors of each case lies what the library dequantises them to. The libraries
need no GPU for this, but their packages ask for one, so they are installed without what they
depend on, into folders of their own:

    pip install --no-deps --target NEW compressed-tensors==0.20.0 loguru auto-gptq==0.7.1
    pip download --no-deps --no-binary :all: autoawq==0.2.9   # unpack its folder awq into NEW
    pip install --no-deps --target OLD compressed-tensors==0.9.4   # the last line that knew g_idx
    PYTHONPATH=NEW python tests/golden/packed_weights.py
    PYTHONPATH=OLD python tests/golden/packed_weights.py --with-order
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FILE = Path(__file__).with_name("packed_weights.safetensors")
IN_FEATURES, OUT_FEATURES = 64, 32
NARROW = 16
"""Outputs of compressed-tensors' cases."""

Case = tuple[dict[str, Any], dict[str, Tensor]]
"""quantization_config, and tensors: those stored, and "expected"."""


def module_of(package: str, *path: str) -> Any:
    """A module of a package whose own __init__ needs what is not there."""
    (folder,) = importlib.util.find_spec(package).submodule_search_locations  # type: ignore[union-attr]
    file = Path(folder).joinpath(*path)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_scales(num_rows: int, num_groups: int) -> Tensor:
    """Of about the size that weights have."""
    return (torch.rand(num_rows, num_groups) * 0.02 + 0.001).half()


def gptq(bits: int, group_size: int, *, sym: bool, desc_act: bool) -> Case:
    """By AutoGPTQ's layer, whose product with the identity is its weight."""
    layer_type = module_of("auto_gptq", "nn_modules", "qlinear", "qlinear_cuda.py").QuantLinear
    size = IN_FEATURES if group_size == -1 else group_size
    num_groups = IN_FEATURES // size
    scales = random_scales(OUT_FEATURES, num_groups)
    middle = 1 << (bits - 1)
    zeros = torch.full((OUT_FEATURES, num_groups), float(middle))
    if not sym:  # AutoGPTQ cannot store a zero point of 0
        zeros = torch.randint(1, 1 << bits, zeros.shape).float()
    groups = torch.arange(IN_FEATURES, dtype=torch.int32) // size
    if desc_act:
        groups = groups[torch.randperm(IN_FEATURES)]
    codes = torch.randint(0, 1 << bits, (OUT_FEATURES, IN_FEATURES))
    linear = torch.nn.Linear(IN_FEATURES, OUT_FEATURES, bias=False)
    each = groups.long()
    linear.weight.data = (codes - zeros[:, each]) * scales.float()[:, each]
    layer = layer_type(bits, group_size, IN_FEATURES, OUT_FEATURES, bias=False)
    layer.autogptq_cuda_available = False
    layer.pack(linear, scales.float(), zeros, groups)
    layer.scales = layer.scales.half()
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "desc_act": desc_act,
    }
    return config, {
        "qweight": layer.qweight,
        "qzeros": layer.qzeros,
        "scales": layer.scales,
        "g_idx": layer.g_idx,
        "expected": layer(torch.eye(IN_FEATURES).half()).t().contiguous(),
    }


def awq() -> Case:
    """Any words, by AutoAWQ's dequantisation."""
    packing = module_of("awq", "utils", "packing_utils.py")
    num_groups = IN_FEATURES // 32

    def words(num_rows: int) -> Tensor:
        return torch.randint(-(1 << 31), 1 << 31, (num_rows, OUT_FEATURES // 8)).int()

    qweight, qzeros = words(IN_FEATURES), words(num_groups)
    scales = random_scales(num_groups, OUT_FEATURES)
    expected = packing.dequantize_gemm(qweight, qzeros, scales, 4, 32).t().contiguous()
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
    }
    return config, {"qweight": qweight, "qzeros": qzeros, "scales": scales, "expected": expected}


def compressed_weights(bits: int, strategy: str, *, symmetric: bool, **more: Any) -> dict[str, Any]:
    """The arguments of compressed-tensors' QuantizationArgs."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    return weights | ({"group_size": 32} if strategy == "group" else {}) | more


def compressed_config(weights: dict[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def compressed_inputs(weights: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """A weight, its scales and zero points."""
    num_groups = IN_FEATURES // 32 if weights["strategy"] == "group" else 1
    limit = 1 << (weights["num_bits"] - 1)
    zeros = torch.zeros(NARROW, num_groups, dtype=torch.int8)
    if not weights["symmetric"]:
        zeros = torch.randint(-limit, limit, zeros.shape, dtype=torch.int8)
    return {
        "weight": (torch.randn(NARROW, IN_FEATURES) * 0.05).to(dtype),
        "weight_scale": random_scales(NARROW, num_groups).to(dtype),
        "weight_zero_point": zeros,
    }


def compressed(weights: dict[str, Any], dtype: torch.dtype) -> Case:
    """By compressed-tensors' compressor and decompressor."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    stored = PackedQuantizationCompressor.compress(compressed_inputs(weights, dtype), scheme)
    expected = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    return compressed_config(weights), stored | {"expected": expected.to(dtype)}


def compressed_with_order(weights: dict[str, Any]) -> Case:
    """As compressed, by the version that knew the order of activations."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs

    given = compressed_inputs(weights, torch.float16)
    g_idx = (torch.arange(IN_FEATURES) // 32)[torch.randperm(IN_FEATURES)].int()
    compressor = PackedQuantizationCompressor()
    scale, zero_point = given["weight_scale"], given["weight_zero_point"]
    arguments = QuantizationArgs(**weights)
    stored = compressor.compress_weight(
        weight=given["weight"],
        scale=scale,
        zero_point=zero_point,
        g_idx=g_idx,
        quantization_args=arguments,
    )
    stored |= {"weight_scale": scale, "weight_g_idx": g_idx}
    expected = compressor.decompress_weight(
        compressed_data=stored | {"weight_zero_point": zero_point}, quantization_args=arguments
    )
    return compressed_config(weights), stored | {"expected": expected.half()}


def make_cases(*, with_order: bool) -> dict[str, Case]:
    torch.manual_seed(7)
    if with_order:
        weights = compressed_weights(4, "group", symmetric=True, actorder="group")
        return {"compressed int4 in activation order": compressed_with_order(weights)}
    return {
        "gptq int4 asymmetric": gptq(4, 32, sym=False, desc_act=False),
        "gptq int4 in activation order": gptq(4, 32, sym=False, desc_act=True),
        "gptq int4 rows": gptq(4, -1, sym=True, desc_act=False),
        "gptq int8": gptq(8, 32, sym=True, desc_act=False),
        "awq": awq(),
        **{
            f"compressed int{bits} {strategy} {'symmetric' if symmetric else 'asymmetric'}": (
                compressed(compressed_weights(bits, strategy, symmetric=symmetric), dtype)
            )
            for bits, strategy, symmetric, dtype in (
                (4, "group", True, torch.bfloat16),
                (4, "group", False, torch.float16),
                (4, "channel", False, torch.bfloat16),
                (8, "group", False, torch.bfloat16),
            )
        },
    }


def read_cases() -> dict[str, Case]:
    """What the file holds."""
    with safe_open(FILE, framework="pt") as file:
        configs = json.loads(file.metadata()["configs"])
        tensors: dict[str, dict[str, Tensor]] = {name: {} for name in configs}
        for key in file.keys():  # noqa: SIM118  # not a mapping
            case, _, name = key.partition("/")
            tensors[case][name] = file.get_tensor(key)
    return {name: (configs[name], tensors[name]) for name in configs}


def main() -> None:
    """Add the cases of the libraries at hand to the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--with-order", action="store_true")
    cases = read_cases() if FILE.exists() else {}
    cases |= make_cases(with_order=parser.parse_args().with_order)
    save_file(
        {
            f"{case}/{name}": tensor.contiguous()
            for case, (_, tensors) in cases.items()
            for name, tensor in tensors.items()
        },
        FILE,
        metadata={"configs": json.dumps({name: config for name, (config, _) in cases.items()})},
    )


if __name__ == "__main__":
    main()
