"""`generate` of transformers: one static batch of rows of equal length, its best case.

Run by benchmarks.peers: PYTHON -m benchmarks.peer_workers.transformers_worker MODEL_DIR THREADS
"""

from __future__ import annotations

import sys

import torch
import transformers

from benchmarks.peer_workers.protocol import Generate, Outcome, Ready, serve


def load(path: str, num_threads: int) -> tuple[Ready, Generate]:
    """The model, as a function."""
    torch.set_num_threads(num_threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model.eval()
    model.generation_config.eos_token_id = None

    def generate(prompts: list[list[int]], output_len: int) -> Outcome:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=output_len,
                min_new_tokens=output_len,
                pad_token_id=0,
            )
        return {"token_ids": made[:, ids.shape[1] :].tolist(), "decode_s": None}

    ready: Ready = {
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "settings": {"dtype": "bfloat16", "num_threads": str(num_threads)},
    }
    return ready, generate


if __name__ == "__main__":
    serve(lambda: load(sys.argv[1], int(sys.argv[2])))
