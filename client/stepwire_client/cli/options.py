"""Options that several commands share, and where each value came from."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from stepwire_client.cluster_config import (
    ClusterConfig,
    Dtype,
    KernelChoice,
    KVCacheDtype,
    LoadFormat,
    Quantization,
    QuantizationGroupSize,
    SchedulingPolicy,
    SpeculativeMethod,
    SpeculativeVerification,
)
from stepwire_client.credentials import Credentials
from stepwire_client.params import SamplingParams

DEFAULT_MODEL = "smollm2-135m"


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """How to run a model on this machine."""

    dtype: Dtype | None = None
    """Of weights and activations."""
    quantization: Quantization | None = None
    """auto serves weights as they are stored, none dequantises them, int4 rounds floats."""
    quantization_group_size: QuantizationGroupSize | None = None
    """Inputs that share a scale under int4."""
    kv_cache_dtype: KVCacheDtype | None = None
    """Of keys and values."""
    max_num_seqs: int | None = None
    """Most sequences that run at once."""
    max_num_batched_tokens: int | None = None
    """Most tokens a step."""
    max_model_len: int | None = None
    """Most tokens of a sequence, prompt and output."""
    block_size: int | None = None
    """Tokens a KV block."""
    device: str | None = None
    """auto, cpu, cuda or cuda:N."""
    gpu_memory_utilization: float | None = None
    """Part of a GPU's memory that may be used in all."""
    enforce_eager: Annotated[bool | None, Parameter(negative=())] = None
    """Launch every kernel of a GPU step: no CUDA graphs."""
    kv_cache_memory_bytes: int | None = None
    """Size of the KV pool in bytes."""
    num_kv_blocks: int | None = None
    """Size of the KV pool in blocks."""
    kernels: KernelChoice | None = None
    """Which implementation of the operations computes."""
    num_threads: int | None = None
    """Threads that compute, in each executor."""
    tensor_parallel_size: int = 1
    """Executors that compute the model together."""
    load_format: LoadFormat | None = None
    """dummy fills the weights with noise."""
    scheduling_policy: SchedulingPolicy | None = None
    """Order of admission."""
    enable_prefix_caching: bool | None = None
    """Whether prompts share the KV blocks of equal beginnings."""
    speculative_method: SpeculativeMethod | None = None
    """Where draft tokens come from: what was said before, or a draft model."""
    speculative_model: str | None = None
    """The draft model: a name, a folder or a .gguf file; needs the model's tokenizer."""
    num_speculative_tokens: int | None = None
    """Most draft tokens a step for each sequence."""
    speculative_verification: SpeculativeVerification | None = None
    """sampled keeps every token as without drafts, rejection only how likely each is."""

    def to_config(self, model: Path, **more: Any) -> ClusterConfig:
        """The cluster's configuration; more sets fields that are no options, and overrides them."""
        chosen = {field.name: getattr(self, field.name) for field in fields(self)}
        return ClusterConfig(model=model, **chosen | more)


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionOptions:
    """How to reach a server that is protected."""

    token: str | None = None
    """Token that the server asks for; better in STEPWIRE_TOKEN, where other users do not see it."""
    tls: Annotated[bool, Parameter(negative=())] = False
    """Use TLS, and trust the CAs that this machine trusts."""
    tls_ca: Path | None = None
    """PEM file of the CAs to trust instead, as of a private cluster."""
    tls_cert: Path | None = None
    """PEM file of your certificate, where the server asks for one."""
    tls_key: Path | None = None
    """PEM file of its private key."""
    tls_server_name: str | None = None
    """Name in the server's certificate, where it is not the host of the address."""
    insecure: Annotated[bool, Parameter(negative=())] = False
    """Send the token in plain text to another machine."""

    def to_credentials(self) -> Credentials:
        """As clients take them."""
        return Credentials(**{field.name: getattr(self, field.name) for field in fields(self)})


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How to choose tokens."""

    max_tokens: int | None = None
    """Most tokens to generate."""
    min_tokens: int | None = None
    """No end before this many."""
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    top_k: int | None = None
    """Only the k most likely tokens."""
    top_p: float | None = None
    """Only the most likely tokens that together reach this probability."""
    min_p: float | None = None
    """Only tokens at least this likely relative to the likeliest."""
    seed: int | None = None
    """Makes a sampled answer repeatable."""
    presence_penalty: float | None = None
    """Against tokens generated before."""
    frequency_penalty: float | None = None
    """Against tokens, for each time they were generated."""
    repetition_penalty: float | None = None
    """Against tokens of prompt and output."""
    stop: Annotated[list[str] | None, Parameter(consume_multiple=False)] = None
    """The answer ends before this text; may be repeated."""
    ignore_eos: bool | None = None
    """Goes on past the model's end-of-sequence tokens."""

    def to_params(self) -> SamplingParams:
        """As a request carries them."""
        chosen = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen["stop"] = chosen["stop"] or ()
        return SamplingParams(**chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A value in force, for the banner."""

    name: str
    """As on the command line, without dashes."""
    value: str
    """In words."""
    source: str
    """One of "--name", the environment variable, or "default"."""

    def __str__(self) -> str:
        return f"{self.name} {self.value} ({self.source})"


def settings_in_force(
    model: str,
    options: ClusterOptions,
    *,
    arguments: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> list[Setting]:
    """The model, the dtypes, and whatever was set, each with its source.

    The processes read STEPWIRE_EXECUTOR_* and STEPWIRE_SCHEDULER_* on their own; those count
    where neither an option nor STEPWIRE_* is given.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    environ = os.environ if environ is None else environ
    always = {"model": model, "dtype": "auto", "kv_cache_dtype": "auto"}
    values: dict[str, object] = {"model": model}
    values |= {field.name: getattr(options, field.name) for field in fields(options)}
    settings: list[Setting] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        is_flag = any(
            argument.partition("=")[0] in (f"--{flag}", f"--no-{flag}") for argument in arguments
        )
        prefixes = ("STEPWIRE_", "STEPWIRE_EXECUTOR_", "STEPWIRE_SCHEDULER_")
        variable = next((p + name.upper() for p in prefixes if p + name.upper() in environ), None)
        if is_flag:
            source = f"--{flag}"
        elif variable is not None:
            source = variable
            value = environ[variable]
        elif name == "model" and model in arguments:
            source = "argument"
        elif name in always:
            source, value = "default", always[name]
        else:
            continue
        settings.append(Setting(name=flag, value=str(value), source=source))
    return settings
