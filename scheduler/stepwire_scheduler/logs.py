"""Structured logs: one JSON object a line on standard error.

Whatever runs for a request binds its id with `bound_request`, so that every line of it carries
request_id. Prompts and outputs are never logged: no event takes them, and tracebacks are
rendered without local variables.
"""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager
from typing import Any, TextIO

import structlog
from structlog.typing import FilteringBoundLogger, Processor

from stepwire_scheduler.config import LogLevel


def configure_logging(level: LogLevel, stream: TextIO | None = None) -> None:
    """Send structlog and the standard library's logging (grpc's, asyncio's) to stream."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )


def get_logger(component: str) -> FilteringBoundLogger:
    """A logger whose lines name the component; may be made before logging is configured."""
    logger: FilteringBoundLogger = structlog.get_logger(component, component=component)
    return logger


def bound_request(request_id: str) -> AbstractContextManager[Any]:
    """Put request_id on every line logged inside, also in tasks started there."""
    return structlog.contextvars.bound_contextvars(request_id=request_id)
