"""Flags and environment variables to a `SchedulerConfig`: flags first, then environment."""

from __future__ import annotations

import argparse
import ast
import inspect
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from stepwire_scheduler.config import SchedulerConfig
from stepwire_scheduler.errors import ConfigError
from stepwire_scheduler.speculation.config import (
    MAX_HISTORY_TOKENS,
    MAX_NGRAM,
    MAX_SPECULATIVE_TOKENS,
)

ENVIRONMENT_PREFIX = "STEPWIRE_SCHEDULER_"

_FLAG_OF_FIELD = {
    "executor_addresses": "executor",
    "standby_executor_addresses": "standby_executor",
}
_AT_LEAST_ZERO = {
    "max_resumes",
    "drain_timeout_ms",
    "resume_retention_ms",
    "max_retained_bytes",
    "speculative_history_tokens",
}
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}


def parse_config(arguments: Sequence[str], environment: Mapping[str, str]) -> SchedulerConfig:
    """Read flags and STEPWIRE_SCHEDULER_* variables.

    Raises ConfigError with one line that names the setting; SystemExit(0) after --help.
    """
    hints = get_type_hints(SchedulerConfig)
    given = vars(
        _parser(hints, show_help=bool({"-h", "--help"} & set(arguments))).parse_args(arguments)
    )
    settings: dict[str, Any] = {}
    for setting in fields(SchedulerConfig):
        flag = "--" + _flag_name(setting.name)
        variable = ENVIRONMENT_PREFIX + _flag_name(setting.name).replace("-", "_").upper()
        if given[setting.name] is not None:
            source, value = flag, given[setting.name]
        elif variable in environment:
            source, value = variable, environment[variable]
        elif setting.default is MISSING:
            raise ConfigError(f"{flag} is missing: give {flag} or set {variable}")
        else:
            continue
        settings[setting.name] = _convert(setting.name, hints[setting.name], value, source)
    config = SchedulerConfig(**settings)
    _check_addresses(config)
    _check_tls(config)
    _check_speculation(config)
    return config


def _flag_name(field_name: str) -> str:
    return _FLAG_OF_FIELD.get(field_name, field_name).replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the flags")


def _parser(hints: Mapping[str, Any], *, show_help: bool) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m stepwire_scheduler",
        description="Schedules requests for one model onto stepwire executors.",
        epilog=f"Each flag can be set by an environment variable, {ENVIRONMENT_PREFIX}MODEL.",
        allow_abbrev=False,
    )
    descriptions = _field_docstrings() if show_help else {}
    for setting in fields(SchedulerConfig):
        default = setting.default
        text = descriptions.get(setting.name, "")
        if default not in (MISSING, None, ()):
            shown = ",".join(default) if isinstance(default, tuple) else default
            text += f" Default: {shown}."
        hint = hints[setting.name]
        action = "append" if _is_list_of_groups(hint) else "store"
        parser.add_argument(
            "--" + _flag_name(setting.name),
            dest=setting.name,
            action=argparse.BooleanOptionalAction if hint is bool else action,
            default=None,
            help=text.replace("%", "%%"),
        )
    return parser


def _field_docstrings() -> dict[str, str]:
    """The docstring under each field of SchedulerConfig."""
    body = ast.parse(inspect.getsource(SchedulerConfig)).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        statement.target.id: str(docstring.value.value)
        for statement, docstring in zip(body.body, body.body[1:], strict=False)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(docstring, ast.Expr)
        and isinstance(docstring.value, ast.Constant)
    }


def _is_list_of_groups(hint: Any) -> bool:
    return bool(hint == tuple[tuple[str, ...], ...])


def _convert(name: str, hint: Any, value: str | bool | list[str], source: str) -> Any:
    """The value in the field's type; source names the flag or variable in errors.

    value: a list where the flag may be repeated.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, list):
        value = ";".join(value)
    if _is_list_of_groups(hint):
        return tuple(_split(group, ",") for group in _split(value, ";"))
    if choices := _choices(hint):
        if value not in choices:
            raise ConfigError(f"{source} must be one of {', '.join(choices)}, not {value!r}")
        return value
    if hint is bool:
        if value.lower() not in _TRUE | _FALSE:
            raise ConfigError(f"{source} must be true or false, not {value!r}")
        return value.lower() in _TRUE
    if hint is int or int in get_args(hint):
        least = 0 if name in _AT_LEAST_ZERO else 1
        if not (value.isascii() and value.isdecimal() and len(value) <= 12 and int(value) >= least):
            raise ConfigError(f"{source} must be a whole number, at least {least}, not {value!r}")
        return int(value)
    if get_origin(hint) is tuple:
        return _split(value, ",")
    if not value:
        raise ConfigError(f"{source} is empty")
    return value


def _choices(hint: Any) -> tuple[str, ...]:
    """Words that a Literal, or a Literal or None, allows; empty for other types."""
    for each in (hint, *get_args(hint)):
        if get_origin(each) is Literal:
            return get_args(each)
    return ()


def _split(text: str, separator: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(separator) if part.strip())


def split_address(address: str, source: str) -> tuple[str, int]:
    """HOST:PORT or [IPV6]:PORT; raises ConfigError."""
    host, separator, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (separator and host and port.isascii() and port.isdecimal() and int(port) < 65_536):
        raise ConfigError(f"{source} must be HOST:PORT, not {address!r}")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_addresses(config: SchedulerConfig) -> None:
    host, _ = split_address(config.listen, "--listen")
    if not is_loopback(host) and not config.insecure and (missing := _missing_protection(config)):
        raise ConfigError(
            f"--listen {config.listen} is reachable from other machines: give {missing}, use "
            "127.0.0.1, or add --insecure to serve anyone in plain text"
        )
    if config.metrics_listen is not None:
        host, _ = split_address(config.metrics_listen, "--metrics-listen")
        if not is_loopback(host) and not config.insecure:
            raise ConfigError(
                f"--metrics-listen {config.metrics_listen} is reachable from other machines, and "
                "metrics have neither encryption nor authentication; use 127.0.0.1, or add "
                "--insecure to accept that"
            )
    if not config.executor_addresses:
        raise ConfigError("--executor is empty")
    for address in config.executor_addresses:
        split_address(address, "--executor")
    seen = set(config.executor_addresses)
    for address in (each for group in config.standby_executor_addresses for each in group):
        split_address(address, "--standby-executor")
        if address in seen:
            raise ConfigError(f"--standby-executor {address} is named already: name each once")
        seen.add(address)


def _missing_protection(config: SchedulerConfig) -> str:
    """Flags that a port open to other machines still needs."""
    missing = []
    if config.tls_cert is None:
        missing.append("--tls-cert and --tls-key")
    if config.auth_tokens_file is None and config.tls_client_ca is None:
        missing.append("--auth-tokens-file or --tls-client-ca")
    return ", and ".join(missing)


def _check_tls(config: SchedulerConfig) -> None:
    """Flags that mean nothing alone; an unused one would look like protection."""
    for cert, key, cert_flag in (
        (config.tls_cert, config.tls_key, "--tls-cert"),
        (config.executor_tls_cert, config.executor_tls_key, "--executor-tls-cert"),
    ):
        if (cert is None) != (key is None):
            key_flag = cert_flag.removesuffix("cert") + "key"
            raise ConfigError(f"{cert_flag} and {key_flag} belong together: give both")
    if config.tls_client_ca is not None and config.tls_cert is None:
        raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key")
    if config.executor_tls_ca is None:
        for value, flag in (
            (config.executor_tls_cert, "--executor-tls-cert"),
            (config.executor_tls_server_name, "--executor-tls-server-name"),
        ):
            if value is not None:
                raise ConfigError(f"{flag} needs --executor-tls-ca")


def _check_speculation(config: SchedulerConfig) -> None:
    """What the executors must offer for it is checked once they answer."""
    num_drafts = config.num_speculative_tokens
    if num_drafts is not None:
        if config.speculative_method is None:
            raise ConfigError(
                "--num-speculative-tokens needs --speculative-method ngram, suffix or draft_model"
            )
        if num_drafts > MAX_SPECULATIVE_TOKENS:
            raise ConfigError(
                f"--num-speculative-tokens must be at most {MAX_SPECULATIVE_TOKENS}, "
                f"not {num_drafts}"
            )
    budget = config.max_num_batched_tokens
    if budget is not None and config.max_num_drafts >= budget:
        raise ConfigError(
            f"--num-speculative-tokens {config.max_num_drafts} and the token before them do not "
            f"fit in --max-num-batched-tokens {budget}: lower the one or raise the other"
        )
    low, high = config.speculative_ngram_min, config.speculative_ngram_max
    if not low <= high <= MAX_NGRAM:
        raise ConfigError(
            "--speculative-ngram-min must not be above --speculative-ngram-max, nor that above "
            f"{MAX_NGRAM}: they are {low} and {high}"
        )
    if config.speculative_history_tokens > MAX_HISTORY_TOKENS:
        raise ConfigError(
            f"--speculative-history-tokens must be at most {MAX_HISTORY_TOKENS}, "
            f"not {config.speculative_history_tokens}"
        )
