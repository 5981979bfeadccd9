"""What a whole cluster shows to others: its ports, and how it serves beyond this machine."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from stepwire_client import Client, ClusterConfig, Credentials, LocalCluster, SamplingParams
from stepwire_client.certificates import make_certificates
from stepwire_client.errors import AuthenticationError, ResourceExhaustedError
from stepwire_scheduler.tenants import digest_of
from support.scheduler_tokenizers import write_tokenizer


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    write_tokenizer(path)
    return path


@contextmanager
def stepwire_serve(model: Path, *flags: str) -> Iterator[tuple[psutil.Process, str]]:
    """The command in a process; yields it and the scheduler's address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "stepwire_client.cli", "serve", str(model), "--port", "0", *flags],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("serving "):
                yield psutil.Process(process.pid), line.split(" at ")[1].split(";")[0]
                break
        else:
            raise AssertionError("it ended before it served")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=60)
        finally:
            process.kill()


def sockets(process: psutil.Process) -> list[tuple[str, str]]:
    """Program and address of every socket to which others may send, in all processes."""
    found: list[tuple[str, str]] = []
    for each in (process, *process.children(recursive=True)):
        words = each.cmdline()
        program = next((word for word in words if word.startswith("stepwire_")), " ".join(words))
        for connection in each.net_connections("inet"):
            is_datagram = connection.type == socket.SOCK_DGRAM and not connection.raddr
            if connection.status == psutil.CONN_LISTEN or is_datagram:
                ip = ipaddress.ip_address(connection.laddr.ip)
                found.append((program, str(getattr(ip, "ipv4_mapped", None) or ip)))
    return found


def test_every_socket_of_a_cluster_is_on_loopback(tiny_model: Path) -> None:
    """The store and the pairs of torch.distributed too, which by default are on all interfaces."""
    with stepwire_serve(tiny_model, "--tensor-parallel-size", "2") as (process, address):
        with Client(address) as client:
            assert client.generate("hi", SamplingParams(max_tokens=4)).token_ids
        found = sockets(process)
    # The scheduler's API and metrics; each executor's API; rank 0's store, and gloo's.
    programs = [program for program, _ in found]
    assert programs.count("stepwire_scheduler") == 2
    assert programs.count("stepwire_executor") >= 3
    assert set(programs) == {"stepwire_scheduler", "stepwire_executor"}
    assert {address for _, address in found} <= {"127.0.0.1", "::1"}


def test_serve_reaches_others_with_tls_and_tokens_and_needs_no_insecure(
    tiny_model: Path, tmp_path: Path
) -> None:
    make_certificates(tmp_path)
    (tmp_path / "tokens").write_text(f"alice sha256:{digest_of('a').hex()}\n")
    with stepwire_serve(
        tiny_model,
        *("--host", "0.0.0.0"),
        *("--tls-cert", f"{tmp_path}/scheduler.pem", "--tls-key", f"{tmp_path}/scheduler-key.pem"),
        *("--auth-tokens-file", f"{tmp_path}/tokens"),
    ) as (process, address):
        port = address.rpartition(":")[2]
        credentials = Credentials(tls_ca=tmp_path / "ca.pem", token="a")
        with Client(f"localhost:{port}", credentials=credentials) as client:
            assert client.generate("hi", SamplingParams(max_tokens=4)).token_ids
        with (
            Client(
                f"localhost:{port}", credentials=Credentials(tls_ca=tmp_path / "ca.pem")
            ) as nobody,
            pytest.raises(AuthenticationError),
        ):
            nobody.generate("hi")
        found = sockets(process)
    open_to_others = [program for program, address in found if address != "127.0.0.1"]
    assert open_to_others == ["stepwire_scheduler"]  # and not its metrics, nor the executor


def test_tenants_of_a_cluster_are_kept_apart(tiny_model: Path, tmp_path: Path) -> None:
    """Quotas, request ids and the prefix cache, all of them end to end."""
    tokens = tmp_path / "tokens"
    tokens.write_text(
        f"alice sha256:{digest_of('a').hex()} max_requests=1\nbob sha256:{digest_of('b').hex()}\n"
    )
    config = ClusterConfig(model=tiny_model, auth_tokens_file=tokens, num_threads=1)
    with LocalCluster(config) as cluster:
        cluster.wait_until_ready(120)
        alice, bob = (
            Client(cluster.address, credentials=Credentials(token=token)) for token in "ab"
        )
        with alice, bob:
            prompt, short = "The quick brown fox " * 8, SamplingParams(max_tokens=1)
            cached = [
                client.generate(prompt, short).usage.num_cached_tokens
                for client in (alice, alice, bob, bob)
            ]
            assert cached[0] == cached[2] == 0
            assert cached[1] == cached[3] > 0
            long = SamplingParams(max_tokens=900, ignore_eos=True)
            with alice.stream("hi", long, request_id="r") as stream:
                next(stream)
                with pytest.raises(ResourceExhaustedError) as caught:
                    alice.generate("hi", short)
                assert caught.value.retry_after_s
                assert bob.generate("hi", short, request_id="r").token_ids
                assert bob.cancel("r") == []
                assert alice.cancel("r") == ["r"]
            for _ in range(100):  # until its end has arrived
                try:
                    assert alice.generate("hi", short).token_ids
                    break
                except ResourceExhaustedError as error:
                    time.sleep(error.retry_after_s or 0)
