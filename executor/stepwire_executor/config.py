"""Settings of one executor process: flags, then environment, then defaults."""

from __future__ import annotations

import argparse
import ipaddress
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal, NoReturn, cast

from stepwire_executor import setting_texts as texts
from stepwire_executor.errors import ConfigError
from stepwire_executor.parallel.torchrun import torchrun_settings

ENVIRONMENT_PREFIX = "STEPWIRE_EXECUTOR_"

DEFAULT_BLOCK_SIZE = 16
DEFAULT_MAX_NUM_SEQS = 64
DEFAULT_DEVICE_BLOCK_SIZE = 64
"""A page that holds a tile of keys spares the kernels a lookup for each row."""
DEFAULT_DEVICE_MAX_NUM_SEQS = 256

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
KVCacheDtypeName = Literal["auto", "fp8"]
KernelsName = Literal["auto", "native", "triton", "reference"]
QuantizationName = Literal["auto", "none", "int4"]
LoadFormat = Literal["auto", "dummy"]
SpeculativeVerificationName = Literal["sampled", "rejection"]
LogLevel = Literal["debug", "info", "warning", "error"]


def _setting(parse: Callable[[str], Any], help_text: str, *, metavar: str = "N") -> dict[str, Any]:
    return {"parse": parse, "help": help_text, "metavar": metavar}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorConfig:
    """What the operator chose; limits that the model or the memory sets come later."""

    model: str = field(
        metadata=_setting(texts.path, "directory or .gguf file of the model", metavar="PATH")
    )
    """Directory with config.json and safetensors, or with one GGUF file; or a GGUF file."""
    listen: str = field(
        default="127.0.0.1:50061",
        metadata=_setting(
            texts.address, "address to serve gRPC on; port 0 picks a free one", metavar="HOST:PORT"
        ),
    )
    """HOST:PORT of the gRPC server."""
    tls_cert: str | None = field(
        default=None,
        metadata=_setting(
            texts.path, "PEM file of the certificate that --listen shows", metavar="FILE"
        ),
    )
    """PEM file of the server's certificate; None serves plain text."""
    tls_key: str | None = field(
        default=None,
        metadata=_setting(texts.path, "PEM file of its private key", metavar="FILE"),
    )
    """PEM file of the certificate's private key."""
    tls_client_ca: str | None = field(
        default=None,
        metadata=_setting(
            texts.path,
            "PEM file of CAs: the scheduler must bring a certificate that one of them signed",
            metavar="FILE",
        ),
    )
    """PEM file of the CAs that sign the certificates of those that may connect."""
    insecure: bool = field(
        default=False,
        metadata=_setting(
            texts.boolean, "allow an address beyond loopback, without authentication"
        ),
    )
    """Whether an address that others can reach may be served in plain text."""
    dtype: DtypeName = field(
        default="auto",
        metadata=_setting(
            texts.one_of("auto", "float32", "bfloat16", "float16"),
            "what to compute in; auto is the checkpoint's",
            metavar="DTYPE",
        ),
    )
    """Dtype of activations and of unquantised weights."""
    quantization: QuantizationName = field(
        default="auto",
        metadata=_setting(
            texts.one_of("auto", "none", "int4"),
            "integers for weights: auto is as the checkpoint stores them, none dequantises them, "
            "int4 rounds an unquantised checkpoint's",
            metavar="NAME",
        ),
    )
    """Which weights are integers on the device; all others are dtype."""
    quantization_group_size: Literal[32, 64] = field(
        default=64,
        metadata=_setting(
            texts.integer_of(32, 64), "inputs that share a scale under --quantization int4"
        ),
    )
    """Neighbouring inputs that share a scale where the load itself rounds to integers."""
    device: str = field(
        default="auto",
        metadata=_setting(
            texts.device,
            "auto, cpu, cuda or cuda:N; auto takes a GPU where there is one",
            metavar="NAME",
        ),
    )
    """What computes."""
    kv_cache_dtype: KVCacheDtypeName = field(
        default="auto",
        metadata=_setting(
            texts.one_of("auto", "fp8"), "dtype of KV pages; auto is the model's", metavar="DTYPE"
        ),
    )
    """Dtype of KV pages."""
    block_size: int | None = field(
        default=None,
        metadata=_setting(
            texts.power_of_two(low=1, high=256),
            f"tokens a KV block, a power of two (default: {DEFAULT_BLOCK_SIZE} on a CPU, "
            f"{DEFAULT_DEVICE_BLOCK_SIZE} on a GPU)",
        ),
    )
    """Tokens a KV block; None is the device's default."""
    max_num_seqs: int | None = field(
        default=None,
        metadata=_setting(
            texts.integer(low=1, high=4_096),
            f"most sequences in the slot table (default: {DEFAULT_MAX_NUM_SEQS} on a CPU, "
            f"{DEFAULT_DEVICE_MAX_NUM_SEQS} on a GPU)",
        ),
    )
    """Rows of the slot table; None is the device's default."""
    max_num_batched_tokens: int = field(
        default=2_048, metadata=_setting(texts.integer(low=1, high=131_072), "most tokens a step")
    )
    """Most tokens a step, over all sequences; bounds the activations' memory."""
    max_model_len: int | None = field(
        default=None,
        metadata=_setting(texts.integer(low=1, high=16_777_216), "longest sequence in tokens"),
    )
    """Longest sequence in tokens, prompt and output; None is the model's own context."""
    gpu_memory_utilization: float = field(
        default=0.9,
        metadata=_setting(
            texts.fraction, "part of a GPU's memory that may be used in all", metavar="FRACTION"
        ),
    )
    """Part of a GPU's memory that weights, activations and the KV pool may take together, counted
    with what other processes have taken."""
    enforce_eager: bool = field(
        default=False,
        metadata=_setting(texts.boolean, "launch every kernel of a GPU step: no CUDA graphs"),
    )
    """Whether decode steps on a GPU are launched kernel by kernel."""
    kv_cache_memory_bytes: int | None = field(
        default=None, metadata=_setting(texts.integer(low=1, high=1 << 50), "memory of the KV pool")
    )
    """Bytes of the KV pool; None chooses: on a CPU from max_num_seqs and the memory available, on a
    GPU all that gpu_memory_utilization leaves."""
    num_kv_blocks: int | None = field(
        default=None,
        metadata=_setting(texts.integer(low=1, high=(1 << 31) - 1), "blocks of the KV pool"),
    )
    """Blocks of the KV pool; at most one of this and kv_cache_memory_bytes."""
    kernels: KernelsName = field(
        default="auto",
        metadata=_setting(
            texts.one_of("auto", "native", "triton", "reference"),
            "which kernels to run; auto takes the fastest that work here",
            metavar="NAME",
        ),
    )
    """Family of kernels."""
    num_threads: int | None = field(
        default=None,
        metadata=_setting(
            texts.integer(low=1, high=1_024), "threads that compute; default: usable cores"
        ),
    )
    """Threads that compute; None is the number of cores this process may use."""
    load_format: LoadFormat = field(
        default="auto",
        metadata=_setting(
            texts.one_of("auto", "dummy"),
            "dummy fills weights with noise instead of reading them",
            metavar="FORMAT",
        ),
    )
    """Where weights come from."""
    speculative_verification: SpeculativeVerificationName = field(
        default="sampled",
        metadata=_setting(
            texts.one_of("sampled", "rejection"),
            "how drafted tokens are verified; sampled keeps every seeded id, rejection keeps the "
            "distribution and accepts more of a draft model's sampled tokens",
            metavar="RULE",
        ),
    )
    """Rule that accepts drafted tokens."""
    speculative_model: str | None = field(
        default=None,
        metadata=_setting(
            texts.path,
            "directory or .gguf file of a smaller model with the same tokenizer, which proposes "
            "tokens where the scheduler asks for drafts",
            metavar="PATH",
        ),
    )
    """As model, of the draft model; None has none. Where dtype and kv_cache_dtype are not auto it
    has them too; it is whole on every rank."""
    tensor_parallel_size: int = field(
        default=1,
        metadata=_setting(
            texts.integer(low=1, high=1_024), "executors that compute the model together"
        ),
    )
    """Ranks of the group that this process belongs to."""
    rank: int = field(
        default=0,
        metadata=_setting(texts.integer(low=0, high=1_023), "place of this executor among them"),
    )
    """Place in the group, from 0."""
    collective_timeout_ms: int = field(
        default=8_000,
        metadata=_setting(
            texts.integer(low=100, high=3_600_000),
            "longest wait for another rank in a step; keep it below the scheduler's "
            "--step-timeout-ms",
        ),
    )
    """Longest wait for another rank inside a step, which then ends the group. Shorter than a
    scheduler's step deadline, so that the ranks beside a stopped one have gone before a new epoch
    asks for them."""
    master_address: str | None = field(
        default=None,
        metadata=_setting(
            texts.address,
            "where rank 0 has the store through which ranks find one another",
            metavar="HOST:PORT",
        ),
    )
    """HOST:PORT of torch.distributed's store; None in a group of one."""
    local_rank: int = field(
        default=0,
        metadata=_setting(
            texts.integer(low=0, high=1_023),
            "place among the ranks of this machine: the GPU that --device auto takes",
        ),
    )
    """Place among the ranks of this machine."""
    local_world_size: int = field(
        default=1,
        metadata=_setting(
            texts.integer(low=1, high=1_024), "ranks of this machine, which share its cores"
        ),
    )
    """Ranks of this machine."""
    external_store: bool = field(
        default=False,
        metadata=_setting(texts.boolean, "another process has the store, as under torchrun"),
    )
    """Whether rank 0 leaves the store to another process."""
    group_id: str = field(
        default="",
        metadata=_setting(
            str, "tells this start of the group from others in the same store", metavar="TEXT"
        ),
    )
    """Prefix of the group's keys in the store."""
    drain_timeout_ms: int = field(
        default=10_000,
        metadata=_setting(
            texts.integer(low=0, high=3_600_000),
            "after SIGTERM, longest wait for the scheduler to take its sequences back",
        ),
    )
    """Milliseconds that the scheduler has, after SIGTERM, to take its sequences back."""
    log_level: LogLevel = field(
        default="info",
        metadata=_setting(
            texts.one_of("debug", "info", "warning", "error"),
            "least level that is logged",
            metavar="LEVEL",
        ),
    )
    """Least level that is logged."""

    @property
    def host(self) -> str:
        """Host of listen, without an IPv6 address's brackets."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach listen."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError((message,))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


_OTHER_FLAGS = {"kernels": ("--attention-backend",)}
"""Names that flags have elsewhere, by setting."""


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="python -m stepwire_executor",
        description="Loads a model and runs the step plans that a scheduler streams to it.",
        epilog=f"Each flag can be set as {ENVIRONMENT_PREFIX}<FLAG>, for example "
        f"{ENVIRONMENT_PREFIX}MAX_NUM_SEQS=32; the command line wins.",
        allow_abbrev=False,
        argument_default=None,
    )
    for each in fields(ExecutorConfig):
        default = "" if each.default in (MISSING, None) else f" (default: {each.default})"
        help_text = each.metadata["help"].replace("%", "%%") + default
        if each.metadata["parse"] is texts.boolean:
            parser.add_argument(
                _flag(each.name), action="store_const", const="true", help=help_text
            )
        else:
            parser.add_argument(
                _flag(each.name),
                *_OTHER_FLAGS.get(each.name, ()),
                dest=each.name,
                metavar=each.metadata["metavar"],
                help=help_text,
            )
    return parser


def parse_config(argv: Sequence[str], environ: Mapping[str, str]) -> ExecutorConfig:
    """Read the settings.

    argv: arguments after the program's name.
    Raises ConfigError with one line for each bad setting; SystemExit for --help.
    """
    arguments = vars(_parser().parse_args(argv))
    by_torchrun = torchrun_settings(environ)
    values: dict[str, Any] = {}
    problems: list[str] = []
    for each in fields(ExecutorConfig):
        source, text = _flag(each.name), arguments[each.name]
        if text is None:
            source = ENVIRONMENT_PREFIX + each.name.upper()
            text = environ.get(source)
        if text is None:
            source = f"{_flag(each.name)}, by torchrun,"
            text = by_torchrun.get(each.name)
        if text is None:
            if each.default is MISSING:
                problems.append(f"{_flag(each.name)} is required")
            continue
        parse = cast(Callable[[str], Any], each.metadata["parse"])
        try:
            values[each.name] = parse(text)
        except ValueError as error:
            problems.append(f"{source} {error}")
    if not problems:
        config = ExecutorConfig(**values)
        if "local_rank" in by_torchrun:
            config = _with_own_port(config)
        problems.extend(_contradictions(config))
        if not problems:
            return config
    raise ConfigError(tuple(problems))


def _with_own_port(config: ExecutorConfig) -> ExecutorConfig:
    """torchrun gives every rank the same flags: each listens one port after the rank before."""
    host, _, port = config.listen.rpartition(":")
    if port == "0":
        return config
    return replace(config, listen=f"{host}:{int(port) + config.local_rank}")


def _contradictions(config: ExecutorConfig) -> list[str]:
    problems = []
    if config.kv_cache_memory_bytes is not None and config.num_kv_blocks is not None:
        problems.append("--kv-cache-memory-bytes and --num-kv-blocks exclude each other: drop one")
    if config.max_num_seqs is not None and config.max_num_batched_tokens < config.max_num_seqs:
        problems.append(
            f"--max-num-batched-tokens must be at least --max-num-seqs ({config.max_num_seqs}), "
            f"not {config.max_num_batched_tokens}"
        )
    if (config.tls_cert is None) != (config.tls_key is None):
        problems.append("--tls-cert and --tls-key belong together: give both")
    elif config.tls_client_ca is not None and config.tls_cert is None:
        problems.append("--tls-client-ca needs --tls-cert and --tls-key")
    elif config.tls_client_ca is None and not config.is_loopback and not config.insecure:
        problems.append(
            f"--listen {config.listen} is beyond loopback and nothing authenticates peers: give "
            "--tls-cert, --tls-key and --tls-client-ca, listen on 127.0.0.1, or add --insecure "
            "on a network you trust"
        )
    if config.rank >= config.tensor_parallel_size:
        problems.append(
            f"--rank must be below --tensor-parallel-size ({config.tensor_parallel_size}), not "
            f"{config.rank}"
        )
    if config.tensor_parallel_size > 1 and config.master_address is None:
        problems.append(
            "--tensor-parallel-size above 1 needs --master-address HOST:PORT, the same for all "
            "ranks, on the machine of rank 0"
        )
    return problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Sizes that depend on what computes."""

    block_size: int
    """Tokens a KV block."""
    max_num_seqs: int
    """Rows of the slot table."""
    max_num_batched_tokens: int
    """Most tokens a step."""


def resolve_capacity(config: ExecutorConfig, *, is_gpu: bool) -> Capacity:
    """Fill in the device's defaults; a step always has room for a token of every sequence."""
    block_size = DEFAULT_DEVICE_BLOCK_SIZE if is_gpu else DEFAULT_BLOCK_SIZE
    max_num_seqs = DEFAULT_DEVICE_MAX_NUM_SEQS if is_gpu else DEFAULT_MAX_NUM_SEQS
    return Capacity(
        block_size=config.block_size or block_size,
        max_num_seqs=config.max_num_seqs or min(max_num_seqs, config.max_num_batched_tokens),
        max_num_batched_tokens=config.max_num_batched_tokens,
    )


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that num_tokens tokens need."""
    return math.ceil(num_tokens / block_size)
