"""What torchrun tells each process it starts, as settings of an executor."""

from __future__ import annotations

from collections.abc import Mapping

_NAMES = {
    "tensor_parallel_size": "WORLD_SIZE",
    "rank": "RANK",
    "local_rank": "LOCAL_RANK",
    "local_world_size": "LOCAL_WORLD_SIZE",
}


def torchrun_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Texts of settings by name; none where torchrun did not start this process.

    Elastic agents run the store themselves, which outlives a restart of the ranks: the number of
    restarts keeps one start apart from the next.
    """
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(environ.get(name) for name in needed):
        return {}
    settings = {name: environ[key] for name, key in _NAMES.items() if environ.get(key)}
    host = environ["MASTER_ADDR"]
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    settings["master_address"] = f"{host}:{environ['MASTER_PORT']}"
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        settings["external_store"] = "true"
    run_id, num_restarts = (environ.get(f"TORCHELASTIC_{n}") for n in ("RUN_ID", "RESTART_COUNT"))
    if run_id or num_restarts:
        settings["group_id"] = f"{run_id or ''}/{num_restarts or 0}"
    return settings
