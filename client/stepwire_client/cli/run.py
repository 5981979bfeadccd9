"""`stepwire run`: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from stepwire_client.cli.options import (
    DEFAULT_MODEL,
    ClusterOptions,
    SamplingOptions,
    settings_in_force,
)
from stepwire_client.cli.screen import banner, closing_line, note
from stepwire_client.cli.session import own_cluster
from stepwire_client.cli.streaming import stream_answer
from stepwire_client.params import ChatMessage, Prompt


def run(
    prompt: str,
    /,
    *,
    model: str = DEFAULT_MODEL,
    sampling: SamplingOptions | None = None,
    cluster: ClusterOptions | None = None,
    raw: Annotated[bool, Parameter(negative=())] = False,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Answer one prompt: start a cluster, stream the answer, stop the cluster.

    Only the answer goes to standard output.

    Parameters
    ----------
    prompt
        The text.
    model
        A known name, a folder or a .gguf file; a known one is fetched when it is missing.
    raw
        Continue the text as it is, without the chat template.
    as_json
        Print one JSON object instead of the text.
    """
    cluster = cluster or ClusterOptions()
    params = (sampling or SamplingOptions()).to_params()
    banner(settings_in_force(model, cluster))
    with own_cluster(model, cluster) as client:
        has_template = client.get_model().has_chat_template
        message: Prompt = prompt if raw or not has_template else [ChatMessage("user", prompt)]
        with client.stream(message, params, timeout_s=600.0) as stream:
            answer = stream_answer(stream, to=None if as_json else sys.stdout)
        first_token_s = answer.first_token_s
        if as_json:
            record = {
                "model": model,
                "text": answer.text,
                "token_ids": answer.token_ids,
                "finish_reason": answer.finish_reason,
                "usage": asdict(answer.completed.usage),
                "timings": asdict(answer.completed.timings),
                "first_token_after_exec_s": first_token_s,
            }
            print(json.dumps(record, ensure_ascii=False))
        done = answer.completed
        note(closing_line(done.usage, done.timings, first_token_s=first_token_s))
