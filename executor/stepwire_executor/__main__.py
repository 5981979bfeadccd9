"""`python -m stepwire_executor`: one executor rank."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Coroutine, MutableMapping, Sequence
from typing import Any

from stepwire_executor.config import ExecutorConfig, parse_config
from stepwire_executor.errors import ConfigError, ListenError
from stepwire_executor.host import default_num_threads

USAGE_STATUS = 2
SPIN_COUNT = "1000"
"""Turns that an idle OpenMP thread waits awake before it sleeps.

Sleeping at once costs a wake-up for each of the hundreds of parallel regions of a step;
spinning for long takes the core from a thread that the others wait for, and from the scheduler.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Read the settings, serve, and return the exit status."""
    try:
        config = parse_config(sys.argv[1:] if argv is None else argv, os.environ)
    except ConfigError as error:
        for problem in error.problems:
            _complain(problem)
        return USAGE_STATUS
    set_thread_environment(config, os.environ)
    # Imported after the environment is set and the flags are known to be good.
    from stepwire_executor.logs import configure_logs
    from stepwire_executor.server import serve
    from stepwire_executor.tls import check_tls_files

    configure_logs(config.log_level)
    try:
        check_tls_files(config)
        return _run(serve(config))
    except ConfigError as error:
        _complain(str(error))
        return USAGE_STATUS
    except ListenError as error:
        _complain(str(error))
        return 1


def set_thread_environment(config: ExecutorConfig, environ: MutableMapping[str, str]) -> None:
    """Tell OpenMP, which reads its environment once, when it is loaded, how to use the cores.

    What the operator set stays.
    """
    num_threads = config.num_threads or default_num_threads(config)
    environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def _run(serving: Coroutine[Any, Any, int]) -> int:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(serving)
    return uvloop.run(serving)


def _complain(problem: str) -> None:
    print(f"stepwire-executor: {problem}", file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a compute thread stuck in native code would hold up the interpreter's end.
    os._exit(status)
