"""Ask several questions at once; the server batches them (`stepwire serve smollm2-135m`).

python examples/asyncio_client.py [HOST:PORT]
"""

import asyncio
import sys

from stepwire_client import AsyncClient, ChatMessage, SamplingParams

QUESTIONS = [
    "What is the capital of France?",
    "What is the capital of Italy?",
    "What is the capital of Spain?",
]


async def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
    params = SamplingParams(temperature=0.0, max_tokens=32)

    async with AsyncClient(address) as client:
        await client.wait_until_ready()
        answers = await asyncio.gather(
            *(client.generate([ChatMessage("user", q)], params) for q in QUESTIONS)
        )
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"{question} {answer.text}")


if __name__ == "__main__":
    asyncio.run(main())
