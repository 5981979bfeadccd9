"""llama.cpp through llama-cpp-python: all sequences in one `llama_decode`, as its batched bench.

Run by benchmarks.peers: PYTHON -m benchmarks.peer_workers.llama_cpp_worker MODEL.gguf THREADS
"""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.peer_workers.protocol import Generate, Outcome, Ready, serve

MAX_BATCH_TOKENS = 2048
"""Of a call of `llama_decode`; the default of llama.cpp's own tools."""


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def discard_log(level: int, text: bytes, data: object) -> None:
    """Say nothing of how the model is loaded."""


class Context:
    """A KV cache for so many sequences of so many tokens."""

    def __init__(self, model: Any, num_seqs: int, seq_len: int, num_threads: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = num_seqs * seq_len
        params.n_seq_max = num_seqs
        params.n_batch = MAX_BATCH_TOKENS
        params.n_threads = params.n_threads_batch = num_threads
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context")
        self._batch = llama_cpp.llama_batch_init(MAX_BATCH_TOKENS, 0, 1)
        self._num_tokens = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def clear(self) -> None:
        """Forget all sequences."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)

    def decode(self, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """Read (token, position, sequence, is last) and return the likeliest after each last."""
        batch, chosen = self._batch, []
        for start in range(0, len(tokens), MAX_BATCH_TOKENS):
            chunk = tokens[start : start + MAX_BATCH_TOKENS]
            batch.n_tokens = len(chunk)
            for i, (token, position, seq, is_last) in enumerate(chunk):
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
                batch.logits[i] = is_last
            status = llama_cpp.llama_decode(self._context, batch)
            if status != 0:
                raise RuntimeError(f"llama_decode says {status}")
            chosen += [self._likeliest(i) for i, token in enumerate(chunk) if token[3]]
        return chosen

    def close(self) -> None:
        """Free the cache."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)

    def _likeliest(self, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, index)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self._num_tokens,))))


def load(path: str, num_threads: int) -> tuple[Ready, Generate]:
    """The model, as a function."""
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(discard_log, ctypes.c_void_p(0))
    model = llama_cpp.llama_model_load_from_file(
        path.encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise RuntimeError("llama.cpp does not read the model")
    contexts: dict[tuple[int, int], Context] = {}

    def generate(prompts: list[list[int]], output_len: int) -> Outcome:
        shape = len(prompts), len(prompts[0]) + output_len
        if shape not in contexts:
            for context in contexts.values():
                context.close()
            contexts.clear()
            contexts[shape] = Context(model, *shape, num_threads)
        context = contexts[shape]
        context.clear()
        ids = context.decode(
            [
                (token, position, seq, position == len(prompt) - 1)
                for seq, prompt in enumerate(prompts)
                for position, token in enumerate(prompt)
            ]
        )
        outputs = [[token] for token in ids]
        prefilled = time.perf_counter()
        for position in range(len(prompts[0]), len(prompts[0]) + output_len - 1):
            ids = context.decode([(token, position, seq, True) for seq, token in enumerate(ids)])
            for output, token in zip(outputs, ids, strict=True):
                output.append(token)
        return {"token_ids": outputs, "decode_s": time.perf_counter() - prefilled}

    ready: Ready = {
        "versions": {"llama-cpp-python": llama_cpp.__version__},
        "settings": {
            "num_threads": str(num_threads),
            "features": llama_cpp.llama_print_system_info().decode().strip(),
        },
    }
    return ready, generate


if __name__ == "__main__":
    serve(lambda: load(sys.argv[1], int(sys.argv[2])))
