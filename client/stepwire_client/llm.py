"""Text generation in one object, on a cluster of its own."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self, cast

from stepwire_client import models
from stepwire_client.client import Client
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
from stepwire_client.errors import ResourceExhaustedError
from stepwire_client.events import Generation, ModelInfo
from stepwire_client.local_cluster import LocalCluster
from stepwire_client.params import ChatMessage, Prompt, SamplingParams
from stepwire_client.pending_generation import PendingGeneration

REQUEST_TIMEOUT_S = 600.0
"""The longest a scheduler grants."""


class LLM:
    """A model and the scheduler and executor processes that run it.

    Fetches a known model that is not in the cache. Ends its processes when it is closed or left
    as a context manager, and with the interpreter.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "smollm2-135m",
        *,
        dtype: Dtype | None = None,
        quantization: Quantization | None = None,
        quantization_group_size: QuantizationGroupSize | None = None,
        kv_cache_dtype: KVCacheDtype | None = None,
        block_size: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_model_len: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        num_kv_blocks: int | None = None,
        kernels: KernelChoice | None = None,
        num_threads: int | None = None,
        tensor_parallel_size: int = 1,
        load_format: LoadFormat | None = None,
        scheduling_policy: SchedulingPolicy | None = None,
        enable_prefix_caching: bool | None = None,
        speculative_method: SpeculativeMethod | None = None,
        speculative_model: str | os.PathLike[str] | None = None,
        num_speculative_tokens: int | None = None,
        speculative_verification: SpeculativeVerification | None = None,
        ready_timeout_s: float = 600.0,
        on_progress: Callable[[ModelInfo], None] | None = None,
    ) -> None:
        """Start the cluster and wait until the model is ready; fields as in ClusterConfig.

        Raises ModelError, SettingError, ClusterError, DeadlineExceededError.
        """
        name = os.fspath(model)
        path = _fetch(name)
        config = ClusterConfig(
            model=path,
            served_model_name=name if name in models.MODELS else None,
            dtype=dtype,
            quantization=quantization,
            quantization_group_size=quantization_group_size,
            kv_cache_dtype=kv_cache_dtype,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            num_kv_blocks=num_kv_blocks,
            kernels=kernels,
            num_threads=num_threads,
            tensor_parallel_size=tensor_parallel_size,
            load_format=load_format,
            scheduling_policy=scheduling_policy,
            enable_prefix_caching=enable_prefix_caching,
            speculative_method=speculative_method,
            speculative_model=_fetch(os.fspath(speculative_model)) if speculative_model else None,
            num_speculative_tokens=num_speculative_tokens,
            speculative_verification=speculative_verification,
        )
        self.cluster = LocalCluster(config).start()
        try:
            self.model_info = self.cluster.wait_until_ready(ready_timeout_s, on_progress)
            self.client = Client(self.cluster.local_address)
        except BaseException:
            self.cluster.stop()
            raise

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Generation]:
        """Generate for all prompts at once; results in the order of the prompts.

        prompts: one text, or a list of prompts (text, token ids or chat messages each).
        params: for all prompts, or one for each.
        The first failure ends the others and is raised (RpcError). Raises ValueError where
        params are not as many as prompts.
        """
        batch: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
        if params is None or isinstance(params, SamplingParams):
            each: Sequence[SamplingParams | None] = [params] * len(batch)
        else:
            each = params
        if len(each) != len(batch):
            raise ValueError(
                f"{len(each)} sampling params for {len(batch)} prompts: give one, or one for each"
            )
        # Enough to keep every slot busy while results travel, without filling the queue.
        window = 2 * max(1, self.model_info.max_num_seqs)
        return _generate_all(self.client, list(zip(batch, each, strict=True)), window=window)

    def chat(
        self,
        conversations: Sequence[ChatMessage] | Sequence[Sequence[ChatMessage]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Generation]:
        """Answer one conversation, or each of a list of them, with the model's chat template."""
        if conversations and isinstance(conversations[0], ChatMessage):
            one = cast("Sequence[ChatMessage]", conversations)
            return self.generate([one], params)
        return self.generate(cast("Sequence[Sequence[ChatMessage]]", conversations), params)

    def close(self) -> None:
        """End the processes; may be repeated."""
        self.client.close()
        self.cluster.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _generate_all(
    client: Client, work: list[tuple[Prompt, SamplingParams | None]], *, window: int
) -> list[Generation]:
    """Run all of work, at most window at a time; what a full queue refuses is sent again."""
    results: list[Generation | None] = [None] * len(work)
    waiting = deque(range(len(work)))
    pending: dict[int, PendingGeneration] = {}
    done: deque[int] = deque()
    has_done = threading.Event()

    def finisher(index: int) -> Callable[[], None]:
        def finish() -> None:
            done.append(index)
            has_done.set()

        return finish

    try:
        while waiting or pending:
            while waiting and len(pending) < window:
                index = waiting.popleft()
                prompt, params = work[index]
                pending[index] = client.submit(prompt, params, timeout_s=REQUEST_TIMEOUT_S)
                pending[index].on_done(finisher(index))
            has_done.wait()
            has_done.clear()
            while done:
                index = done.popleft()
                try:
                    results[index] = pending.pop(index).result()
                except ResourceExhaustedError as error:
                    if error.retry_after_s is None:
                        raise  # Not the queue: the request itself is too big.
                    waiting.appendleft(index)
                    window = max(1, len(pending))
                    time.sleep(error.retry_after_s)
    finally:
        for call in pending.values():
            call.cancel()
    return cast("list[Generation]", results)


def _fetch(name: str) -> Path:
    """Path of a model; a known one that is not in the cache is fetched."""
    return models.pull(name) if name in models.MODELS else models.resolve_model(name)
