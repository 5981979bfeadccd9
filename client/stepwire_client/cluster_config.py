"""What a local cluster is made of."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from stepwire_client.errors import SettingError

Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
KVCacheDtype: TypeAlias = Literal["auto", "fp8"]
KernelChoice: TypeAlias = Literal["auto", "native", "triton", "reference"]
Quantization: TypeAlias = Literal["auto", "none", "int4"]
QuantizationGroupSize: TypeAlias = Literal[32, 64]
LoadFormat: TypeAlias = Literal["auto", "dummy"]
SchedulingPolicy: TypeAlias = Literal["fcfs", "priority"]
SpeculativeMethod: TypeAlias = Literal["ngram", "suffix", "draft_model"]
SpeculativeVerification: TypeAlias = Literal["sampled", "rejection"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """A scheduler and its executors on this machine; None leaves a choice to the process."""

    model: Path
    """Folder of the model, or its .gguf file."""
    served_model_name: str | None = None
    """The name that clients see."""
    dtype: Dtype | None = None
    """Of weights and activations."""
    quantization: Quantization | None = None
    """Integers for weights: auto is as the checkpoint stores them, none dequantises them, int4
    rounds an unquantised checkpoint's."""
    quantization_group_size: QuantizationGroupSize | None = None
    """Inputs that share a scale where int4 rounds."""
    kv_cache_dtype: KVCacheDtype | None = None
    """Of keys and values; auto is the model's dtype."""
    block_size: int | None = None
    """Tokens a KV block."""
    max_num_seqs: int | None = None
    """Most sequences that run at once."""
    max_num_batched_tokens: int | None = None
    """Most tokens a step."""
    max_model_len: int | None = None
    """Most tokens of a sequence, prompt and output together."""
    device: str | None = None
    """auto, cpu, cuda or cuda:N."""
    gpu_memory_utilization: float | None = None
    """Part of a GPU's memory that may be used in all."""
    enforce_eager: bool | None = None
    """Launches every kernel of a GPU step: no CUDA graphs."""
    kv_cache_memory_bytes: int | None = None
    """Size of the KV pool in bytes."""
    num_kv_blocks: int | None = None
    """Size of the KV pool in blocks."""
    kernels: KernelChoice | None = None
    """Which implementation of the operations computes."""
    num_threads: int | None = None
    """Threads of each executor that compute; by default all share the cores."""
    tensor_parallel_size: int = 1
    """Executors that compute the model together."""
    load_format: LoadFormat | None = None
    """dummy fills the weights with noise, to measure without a model's weights."""
    scheduling_policy: SchedulingPolicy | None = None
    """Order of admission."""
    max_inflight_steps: int | None = None
    """Step plans sent before their results are back."""
    enable_prefix_caching: bool | None = None
    """Whether prompts share the KV blocks of equal beginnings."""
    speculative_method: SpeculativeMethod | None = None
    """Where draft tokens come from; by default from the draft model where there is one."""
    speculative_model: Path | None = None
    """Folder or .gguf file of the draft model, which needs the model's tokenizer."""
    num_speculative_tokens: int | None = None
    """Most draft tokens a step for each sequence."""
    speculative_verification: SpeculativeVerification | None = None
    """sampled keeps the tokens that are the same without drafts; rejection keeps their law."""
    listen: str = "127.0.0.1:0"
    """Where the scheduler listens; port 0 takes a free one."""
    metrics_listen: str | None = None
    """Where the scheduler serves Prometheus metrics; None: nowhere."""
    tls_cert: Path | None = None
    """Certificate that the scheduler shows its clients."""
    tls_key: Path | None = None
    """Its private key."""
    tls_client_ca: Path | None = None
    """CAs of the certificates that clients must bring."""
    auth_tokens_file: Path | None = None
    """Tenants and the hashes of their tokens; calls without one are refused."""
    max_requests_per_tenant: int | None = None
    """Requests of one tenant, queued or running."""
    insecure: bool = False
    """Lets the scheduler listen beyond loopback, unencrypted."""
    enable_reflection: bool = False
    """Lets tools ask the scheduler for its protocol."""
    journal: bool = False
    """Records requests on disk while the cluster runs, and starts a scheduler that dies again,
    which goes on with them."""
    start_timeout_s: float = 60.0
    """Time for each process to answer; loading the model is not in it."""
    stop_timeout_s: float = 5.0
    """Time for requests to finish and each process to end before it is killed."""
    executor_command: tuple[str, ...] = (sys.executable, "-m", "stepwire_executor")
    """How to start an executor."""
    scheduler_command: tuple[str, ...] = (sys.executable, "-m", "stepwire_scheduler")
    """How to start a scheduler."""

    def check(self, environ: Mapping[str, str]) -> None:
        """Raise SettingError where settings of different processes do not fit together.

        environ: what the processes inherit.
        """
        model = self.speculative_model or environ.get("STEPWIRE_EXECUTOR_SPECULATIVE_MODEL")
        if self.speculative_method == "draft_model" and not model:
            raise SettingError(
                "--speculative-method draft_model needs --speculative-model: a smaller model with "
                "the same tokenizer"
            )
        if self.speculative_model is not None and self.speculative_method in ("ngram", "suffix"):
            raise SettingError(
                f"--speculative-method {self.speculative_method} has no use for "
                "--speculative-model: leave one of them out"
            )

    def executor_arguments(
        self, *, listen: str, rank: int = 0, master_address: str | None = None
    ) -> list[str]:
        """Flags of an executor process; master_address is where several find one another."""
        names = (
            "dtype",
            "quantization",
            "quantization_group_size",
            "kv_cache_dtype",
            "block_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_model_len",
            "device",
            "gpu_memory_utilization",
            "kv_cache_memory_bytes",
            "num_kv_blocks",
            "kernels",
            "num_threads",
            "load_format",
            "speculative_model",
            "speculative_verification",
        )
        arguments = ["--model", str(self.model), "--listen", listen, *self._flags(names)]
        if self.enforce_eager:
            arguments.append("--enforce-eager")
        if self.tensor_parallel_size > 1 and master_address is not None:
            size = str(self.tensor_parallel_size)
            arguments += ["--tensor-parallel-size", size, "--local-world-size", size]
            arguments += ["--rank", str(rank), "--local-rank", str(rank)]
            arguments += ["--master-address", master_address]
        return arguments

    def is_protected(self, environ: Mapping[str, str]) -> bool:
        """Whether the scheduler asks its clients for TLS or a token; environ: what it inherits."""
        names = ("tls_cert", "auth_tokens_file")
        return any(
            getattr(self, name) is not None or f"STEPWIRE_SCHEDULER_{name.upper()}" in environ
            for name in names
        )

    def scheduler_arguments(
        self,
        *,
        executor: str,
        listen: str | None = None,
        local_socket: Path | None = None,
        journal: Path | None = None,
    ) -> list[str]:
        """Flags of the scheduler process; limits that the executor knows come from there.

        listen: in the place of the configured address. local_socket: where this process reaches
        it without credentials. journal: folder from which it goes on.
        """
        names = (
            "served_model_name",
            "scheduling_policy",
            "max_inflight_steps",
            "num_speculative_tokens",
            "metrics_listen",
            "tls_cert",
            "tls_key",
            "tls_client_ca",
            "auth_tokens_file",
            "max_requests_per_tenant",
        )
        arguments = ["--model", str(self.model), "--executor", executor]
        arguments += ["--listen", listen or self.listen, *self._flags(names)]
        method = self.speculative_method
        if method is None and self.speculative_model is not None:
            method = "draft_model"
        if method is not None:
            arguments += ["--speculative-method", method]
        if local_socket is not None:
            arguments += ["--local-socket", str(local_socket)]
        if journal is not None:
            arguments += ["--journal", str(journal)]
        if self.enable_prefix_caching is not None:
            no = "" if self.enable_prefix_caching else "no-"
            arguments.append(f"--{no}enable-prefix-caching")
        for name in ("insecure", "enable_reflection"):
            if getattr(self, name):
                arguments.append(f"--{name.replace('_', '-')}")
        return arguments

    def _flags(self, names: tuple[str, ...]) -> list[str]:
        flags: list[str] = []
        for name in names:
            value = getattr(self, name)
            if value is not None:
                flags += [f"--{name.replace('_', '-')}", str(value)]
        return flags
