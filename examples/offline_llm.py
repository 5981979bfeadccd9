"""Generate for a batch of prompts without a server: LLM starts and stops its own processes.

python examples/offline_llm.py [MODEL]
"""

import sys

from stepwire_client import LLM, SamplingParams


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
    prompts = ["The capital of France is", "One, two, three,", "The opposite of hot is"]
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=16)

    with LLM(model=model, max_num_seqs=8) as llm:
        for prompt, generation in zip(prompts, llm.generate(prompts, params), strict=True):
            print(repr(prompt), "->", repr(generation.text))


if __name__ == "__main__":
    main()
