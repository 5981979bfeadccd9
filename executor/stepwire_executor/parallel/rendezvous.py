"""How ranks find one another: a store at the address of rank 0, watched while the group lives."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import structlog
import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from stepwire_executor.config import ExecutorConfig
from stepwire_executor.errors import ModelLoadError
from stepwire_executor.kernels.native.library import NativeLibrary
from stepwire_executor.parallel.group import SINGLE_RANK, RankGroup
from stepwire_executor.parallel.process_group import LOAD_TIMEOUT, ProcessGroup

WATCH_INTERVAL_S = 0.5
"""Between looks at the store."""
_POLL_S = 0.05
_BACKLOG = 1024
_STALE_KEY = "stale"

_log: Any = structlog.get_logger("stepwire_executor.parallel")

OnLost = Callable[[str], None]
OnWait = Callable[[], None]


def join_group(
    config: ExecutorConfig,
    device: torch.device,
    *,
    on_lost: OnLost,
    on_wait: OnWait,
    library: NativeLibrary | None = None,
) -> RankGroup:
    """Meet the other ranks and connect to them; a group of one needs nobody.

    on_lost: told, on a thread of its own, why the group is no more. on_wait: called again and
    again while other ranks are waited for; may raise to give up. library: see ProcessGroup.
    Raises ModelLoadError.
    """
    world_size, rank = config.tensor_parallel_size, config.rank
    if world_size == 1:
        return SINGLE_RANK
    deadline_s = time.monotonic() + LOAD_TIMEOUT.total_seconds()
    host, port = _resolve(config, on_wait, deadline_s)
    try:
        store = _connect(config, host, port, is_server=rank == 0 and not config.external_store)
        _sign_in(store, rank, world_size)
        while store.add("present", 0) < world_size:
            _wait_a_moment(on_wait, deadline_s)
        group = ProcessGroup(
            store,
            rank=rank,
            world_size=world_size,
            device=device,
            hostname=_own_address(host, port),
            step_timeout=datetime.timedelta(milliseconds=config.collective_timeout_ms),
            library=library,
        )
        watched = _connect(config, host, port, is_server=False)
    except RuntimeError as error:
        # torch appends a native stack trace.
        reason = str(error).partition("\n")[0].partition("Exception raised")[0].strip()
        raise ModelLoadError(
            f"rank {rank} cannot join its group at {config.master_address}: {reason}; start all "
            f"{world_size} ranks together, with the same --master-address"
        ) from None
    _log.info("ranks_joined", world_size=world_size, transport=group.transport)
    watcher = threading.Thread(
        target=_watch, args=(watched, on_lost), name="group-watch", daemon=True
    )
    watcher.start()
    return group


def is_private(address: str) -> bool:
    """Whether an IP address is of this machine or of a private network."""
    parsed = ipaddress.ip_address(address)
    return (parsed.is_loopback or parsed.is_private) and not parsed.is_unspecified


def _resolve(config: ExecutorConfig, on_wait: OnWait, deadline_s: float) -> tuple[str, int]:
    """IP address and port of the store; a name may come up later than this rank."""
    assert config.master_address is not None
    name, _, port = config.master_address.rpartition(":")
    while True:
        try:
            found = socket.getaddrinfo(name.strip("[]"), int(port), type=socket.SOCK_STREAM)
            break
        except OSError:
            _wait_a_moment(on_wait, deadline_s)
    # "localhost" is an IPv6 address first on some machines, where rank 0 might find another.
    host = str(min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0])
    if not is_private(host) and not config.insecure:
        raise ModelLoadError(
            f"--master-address {config.master_address} is not in a private network and nothing "
            "authenticates ranks: use a private address, or add --insecure"
        )
    return host, int(port)


def _connect(config: ExecutorConfig, host: str, port: int, *, is_server: bool) -> Store:
    if not is_server:
        tcp = TCPStore(host, port, None, False, LOAD_TIMEOUT, wait_for_workers=False)
    else:
        # torch itself would listen on every address of the machine.
        tcp = TCPStore(
            host,
            port,
            None,
            True,
            LOAD_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=_listen(host, port),
        )
    return PrefixStore(f"stepwire/{config.group_id}", tcp)


def _listen(host: str, port: int) -> int:
    """A listening socket's descriptor, which becomes the store's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(_BACKLOG)
        except OSError as error:
            raise ModelLoadError(
                f"--master-address {host}:{port} cannot be listened on ({error.strerror}): give "
                "an address of the machine of rank 0 and a free port; only one rank 0 may run"
            ) from None
        return listener.detach()


def _sign_in(store: Store, rank: int, world_size: int) -> None:
    """Take a rank's place. Raises ModelLoadError where it is taken or the group differs."""
    stored = store.compare_set("world_size", "", str(world_size)).decode()
    if stored != str(world_size):
        raise ModelLoadError(
            f"another rank of this group was started with --tensor-parallel-size {stored}, rank "
            f"{rank} with {world_size}: start all ranks with the same"
        )
    if store.add(f"joined/{rank}", 1) > 1:
        store.set(_STALE_KEY, "1")
        raise ModelLoadError(
            f"rank {rank} was in this group before, which now ends: start all ranks again, each "
            "with another --rank"
        )
    store.add("present", 1)


def _wait_a_moment(on_wait: OnWait, deadline_s: float) -> None:
    on_wait()
    if time.monotonic() > deadline_s:
        raise ModelLoadError("the other ranks of the group do not come: start all of them")
    time.sleep(_POLL_S)


def _own_address(host: str, port: int) -> str:
    """The address by which this machine's packets to the store leave."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing
        return str(probe.getsockname()[0])


def _watch(store: Store, on_lost: OnLost) -> None:
    """End the group with its store, or when a rank of it has started anew."""
    while True:
        try:
            if store.check([_STALE_KEY]):
                on_lost("a rank of the group was started again: all of them must be")
                return
        except RuntimeError:
            on_lost("rank 0 of the group is gone")
            return
        time.sleep(WATCH_INTERVAL_S)
