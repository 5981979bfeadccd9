"""A request's stream, without a server around it."""

from __future__ import annotations

from array import array

from stepwire_scheduler.request_stream import RequestStream
from stepwire_scheduler.sequence import Request, SamplingParams, Sequence


def test_who_leaves_twice_is_waited_for_once() -> None:
    request = Request(
        request_id="r",
        prompt_token_ids=array("I", [1]),
        sampling_params=SamplingParams(max_tokens=1),
        resume_window_ms=1_000,
    )
    left: list[RequestStream] = []

    def note(stream: RequestStream) -> None:
        left.append(stream)
        stream.detach(now_ms=5.0)

    sequence = Sequence(request, 0, order_key=(0, 0), stop_ids=frozenset())
    stream = RequestStream(request, [sequence], max_unread_bytes=1_000, on_close=note)
    reader = stream.attach()
    reader.close()
    reader.close()
    stream.close()
    assert left == [stream]
    stream.attach().close()
    assert left == [stream, stream], "another reader has come and left"
