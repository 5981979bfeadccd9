"""What transformers generates from the real model, by code that shares nothing with ours.

Weights are dequantised by the package `gguf`. `python tests/golden/transformers_smollm2.py
MODEL_DIR` writes the golden file anew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers

GOLDEN_FILE = Path(__file__).parent / "smollm2_135m_greedy.json"
NUM_TOKENS = 64
PADDING_TOKEN_ID = 2
PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain why the sky is blue to a child.",
    "What is 17 + 25?",
    "Write a Python function that reverses a string.",
    "List three uses of copper.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Pride and Prejudice?",
    "Summarise the plot of Cinderella in two sentences.",
    "Give me a recipe for pancakes.",
    "What causes the tides?",
    "Write a short letter to a friend who has moved away.",
    "What is the difference between a list and a tuple in Python?",
    "Name the planets of the solar system in order.",
    "How do vaccines work?",
    "Tell me a joke about a computer.",
    "What does the word 'serendipity' mean?",
    "Plan a weekend in Rome.",
    "Complete the sentence: the quick brown fox",
    "¿Cuál es la capital de España? 🇪🇸",
)


def load(directory: Path) -> Any:
    """A LlamaForCausalLM in float32 with the weights of the GGUF file in a directory."""
    reader = gguf.GGUFReader(next(directory.glob("*.gguf")))

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    num_heads = field("llama.attention.head_count")
    num_kv_heads = field("llama.attention.head_count_kv")
    tensors = {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    config = transformers.LlamaConfig(
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        tie_word_embeddings=True,
        pad_token_id=PADDING_TOKEN_ID,
        eos_token_id=None,
    )

    def split_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
        """From pairs side by side, as the file has them, to halves of a head."""
        rows, columns = weight.shape
        pairs = weight.view(heads, rows // heads // 2, 2, columns)
        return pairs.transpose(1, 2).reshape(rows, columns)

    state = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "lm_head.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
    }
    for layer in range(config.num_hidden_layers):
        source, target = f"blk.{layer}.", f"model.layers.{layer}."
        for theirs, ours in (
            ("attn_norm", "input_layernorm"),
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_norm", "post_attention_layernorm"),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"),
        ):
            state[f"{target}{ours}.weight"] = tensors[f"{source}{theirs}.weight"]
        for letter, heads in (("q", num_heads), ("k", num_kv_heads)):
            weight = tensors[f"{source}attn_{letter}.weight"]
            state[f"{target}self_attn.{letter}_proj.weight"] = split_halves(weight, heads)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True, strict=True)
    # Built on the meta device, the table of frequencies has no values yet.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def generate_greedy(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """NUM_TOKENS ids for each prompt; an end-of-sequence token does not end it."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PADDING_TOKEN_ID] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            pad_token_id=PADDING_TOKEN_ID,
        )
    return out[:, width:].tolist()


def prompt_token_ids(directory: Path) -> list[list[int]]:
    """The chat prompts as the model's own template and tokenizer render them."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    return [
        tokenizer.encode(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            ),
            add_special_tokens=False,
        )
        for prompt in PROMPTS
    ]


def main() -> None:
    directory = Path(sys.argv[1])
    prompts = prompt_token_ids(directory)
    outputs = generate_greedy(load(directory), prompts)
    cases = [
        {"prompt": text, "prompt_token_ids": prompt, "output_token_ids": output}
        for text, prompt, output in zip(PROMPTS, prompts, outputs, strict=True)
    ]
    lines = ",\n".join("  " + json.dumps(case, ensure_ascii=False) for case in cases)
    GOLDEN_FILE.write_text(
        f'{{"transformers": "{transformers.__version__}", "dtype": "float32", "cases": [\n'
        f"{lines}\n]}}\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
