"""vLLM's CPU build: offline `LLM.generate`, compiled before it says that it is ready.

Run by benchmarks.peers: PYTHON -m benchmarks.peer_workers.vllm_worker MODEL_DIR
"""

from __future__ import annotations

import os
import sys

import torch
import vllm

from benchmarks.peer_workers.protocol import Generate, Outcome, Ready, serve

MAX_MODEL_LEN = 2048


def load(path: str) -> tuple[Ready, Generate]:
    """The model, as a function; threads and the KV cache's size are in the environment."""
    model = vllm.LLM(
        path,
        dtype="bfloat16",
        max_model_len=MAX_MODEL_LEN,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )

    def generate(prompts: list[list[int]], output_len: int) -> Outcome:
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False
        )
        made = model.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )
        return {
            "token_ids": [list(output.outputs[0].token_ids) for output in made],
            "decode_s": None,
        }

    ready: Ready = {
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "settings": {
            "dtype": "bfloat16",
            **{name: value for name, value in os.environ.items() if name.startswith("VLLM_CPU_")},
        },
    }
    return ready, generate


if __name__ == "__main__":
    serve(lambda: load(sys.argv[1]))
