"""`python -m stepwire_scheduler`: read the settings, run until SIGTERM."""

from __future__ import annotations

import os
import sys
from collections.abc import Coroutine
from typing import Any

from stepwire_scheduler.command_line import parse_config
from stepwire_scheduler.errors import ConfigError, ListenError


def main() -> int:
    """Returns the exit status: 0 stopped, 1 failed, 2 a setting is wrong."""
    try:
        config = parse_config(sys.argv[1:], os.environ)
    except ConfigError as error:
        return _fail(error.message, 2)

    # What follows takes most of the start; a wrong flag need not wait for it.
    from stepwire_scheduler.logs import configure_logging, get_logger
    from stepwire_scheduler.server import serve
    from stepwire_scheduler.tenants import read_tokens
    from stepwire_scheduler.tls import check_tls_files

    configure_logging(config.log_level)
    try:
        check_tls_files(config)
        tokens = read_tokens(config)
    except ConfigError as error:
        return _fail(error.message, 2)
    try:
        _run(serve(config, tokens, announce=_announce))
    except (ConfigError, ListenError) as error:
        return _fail(error.message, 1)
    except Exception:
        get_logger("main").exception("ended by a defect")
        return 1
    return 0


def _announce(address: str) -> None:
    sys.stdout.write(f"listening on {address}\n")
    sys.stdout.flush()


def _fail(message: str, status: int) -> int:
    sys.stderr.write(f"stepwire_scheduler: {message}\n")
    return status


def _run(main_coroutine: Coroutine[Any, Any, None]) -> None:
    try:
        import uvloop
    except ImportError:  # not on Windows
        import asyncio

        asyncio.run(main_coroutine)
    else:
        uvloop.run(main_coroutine)


if __name__ == "__main__":
    sys.exit(main())
