"""The executor's port under mutual TLS: real processes and the scheduler's own connection."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from stepwire.executor.v1.executor_pb2 import LoadState
from stepwire_client.certificates import make_certificates
from stepwire_executor.probe import main as probe
from stepwire_scheduler.config import SchedulerConfig
from stepwire_scheduler.errors import ExecutorTlsError, PlanStreamError
from stepwire_scheduler.executor_client import ExecutorGroup
from stepwire_scheduler.tls import executor_tls
from support.certificates import Authority
from support.executor_process import executor_process

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificates of `stepwire certs`, and a model."""
    path = tmp_path_factory.mktemp("cluster")
    make_certificates(path, ["127.0.0.1"])
    (path / "model").mkdir()
    (path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return path


def model_flags(folder: Path) -> list[str]:
    model = str(folder / "model")
    return ["--model", model, "--load-format", "dummy", "--num-kv-blocks", "8"]


def tls_flags(folder: Path) -> list[str]:
    return [
        *("--tls-cert", str(folder / "executor.pem")),
        *("--tls-key", str(folder / "executor-key.pem")),
        *("--tls-client-ca", str(folder / "ca.pem")),
    ]


def schedulers(folder: Path, name: str = "scheduler", ca: str = "ca") -> SchedulerConfig:
    return SchedulerConfig(
        model="m",
        executor_tls_ca=str(folder / f"{ca}.pem"),
        executor_tls_cert=str(folder / f"{name}.pem"),
        executor_tls_key=str(folder / f"{name}-key.pem"),
    )


@asynccontextmanager
async def group(address: str, config: SchedulerConfig) -> AsyncIterator[ExecutorGroup]:
    connected = ExecutorGroup([address], tls=executor_tls(config))
    try:
        yield connected
    finally:
        await connected.close()


async def complaint(address: str, config: SchedulerConfig) -> str:
    """Of a scheduler that cannot connect."""
    async with group(address, config) as connected:
        with pytest.raises(ExecutorTlsError) as caught:
            await connected.describe()
    return caught.value.message


async def test_only_a_scheduler_of_the_cluster_is_let_in(folder: Path) -> None:
    async with executor_process(*model_flags(folder), *tls_flags(folder)) as executor:
        address = executor.address
        async with group(address, schedulers(folder)) as connected:
            async with asyncio.timeout(60):
                while True:
                    (description,) = await connected.describe()
                    if description.load_state == LoadState.LOAD_STATE_READY:
                        break
                    await asyncio.sleep(0.05)
            stream = await connected.open_epoch(1, [description])
            stream.cancel()
        without = replace(schedulers(folder), executor_tls_cert=None, executor_tls_key=None)
        assert "--executor-tls-cert" in await complaint(address, without)
        # A client of the public port is nobody here: its certificate is of another CA.
        assert "--executor-tls-cert" in await complaint(address, schedulers(folder, "client"))
        assert "--executor-tls-ca" in await complaint(address, SchedulerConfig(model="m"))
        wrong_ca = schedulers(folder, ca="client-ca")
        assert "not signed by --executor-tls-ca" in await complaint(address, wrong_ca)
        own = ["--tls-cert", f"{folder}/executor.pem", "--tls-key", f"{folder}/executor-key.pem"]
        probes = ([address, "--tls-ca", f"{folder}/ca.pem", *own], [address])
        statuses = [await asyncio.to_thread(probe, arguments) for arguments in probes]
        assert statuses == [0, 1]


async def test_an_executor_in_plain_text_is_told_from_one_that_is_not_there(folder: Path) -> None:
    async with executor_process(*model_flags(folder)) as executor:
        assert "it speaks plain text" in await complaint(executor.address, schedulers(folder))
    async with group("127.0.0.1:1", schedulers(folder)) as nobody:
        with pytest.raises(PlanStreamError):
            await nobody.describe()


async def test_a_renewed_certificate_of_the_scheduler_is_used_at_the_next_connection(
    folder: Path, tmp_path: Path
) -> None:
    authority = Authority(tmp_path / "own")
    pair = Authority(tmp_path / "stranger").issue()
    config = SchedulerConfig(
        model="m",
        executor_tls_ca=str(authority.path),
        executor_tls_cert=str(pair.cert),
        executor_tls_key=str(pair.key),
    )
    flags = [*authority.issue().flags(), "--tls-client-ca", str(authority.path)]
    async with (
        executor_process(*model_flags(folder), *flags) as executor,
        group(executor.address, config) as connected,
    ):
        with pytest.raises(ExecutorTlsError):
            await connected.describe()
        authority.issue(into=pair)
        with pytest.raises((ExecutorTlsError, PlanStreamError)):
            await connected.describe()  # sees that the files have changed
        (description,) = await connected.describe()
        assert description.world_size == 1


@pytest.mark.parametrize("fault", ["missing", "mismatch", "exposed"])
def test_a_faulty_file_ends_the_start_with_status_2_and_one_line(folder: Path, fault: str) -> None:
    flags, named = {
        "missing": (["--tls-cert", "/none.pem", "--tls-key", "/none.pem"], "--tls-cert"),
        "mismatch": (
            ["--tls-cert", f"{folder}/ca.pem", "--tls-key", f"{folder}/client-key.pem"],
            "--tls-key",
        ),
        "exposed": (["--listen", "0.0.0.0:0"], "--listen 0.0.0.0:0"),
    }[fault]
    # A model that is not there: nothing of it is looked at before.
    result = subprocess.run(
        [sys.executable, "-m", "stepwire_executor", "--model", "/none", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"stepwire-executor: {named}")
