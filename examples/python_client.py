"""Stream an answer from a running server (`stepwire serve smollm2-135m`).

python examples/python_client.py [HOST:PORT] [PROMPT]
"""

import sys

from stepwire_client import ChatMessage, Client, Completed, Output, SamplingParams, StepwireError


def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
    prompt = sys.argv[2] if len(sys.argv) > 2 else "What is the capital of France?"
    params = SamplingParams(temperature=0.0, max_tokens=64)

    with Client(address) as client:
        client.wait_until_ready()
        # Leaving the `with` early would cancel the request.
        with client.stream([ChatMessage("user", prompt)], params) as events:
            for event in events:
                if isinstance(event, Output):
                    print(event.text, end="", flush=True)
                elif isinstance(event, Completed):
                    print(
                        f"\n[{event.usage.num_output_tokens} tokens, "
                        f"TTFT {event.timings.ttft_ms:.0f} ms]"
                    )


if __name__ == "__main__":
    try:
        main()
    except StepwireError as error:
        sys.exit(f"error: {error}")
