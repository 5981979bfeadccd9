"""Entry of the command line: commands by name, errors as one line, exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import cyclopts

from stepwire_client.errors import SettingError, StepwireError

COMMANDS = {
    "run": "Answer one prompt: start a cluster, stream the answer, stop the cluster.",
    "serve": "Serve a model over gRPC until interrupted.",
    "chat": "Talk to a model, line by line.",
    "complete": "Continue a text as it is, on a running server.",
    "bench": "Measure latency and throughput of a running server.",
    "pull": "Fetch a known model into the cache.",
    "plan": "Show the memory that a model needs, without loading it.",
    "token": "Make a token for a client of a server that asks for one.",
    "certs": "Make certificates for a private cluster.",
}


def build_app() -> cyclopts.App:
    """Name the commands; the module of each is imported when it is called."""
    app = cyclopts.App(
        name="stepwire",
        help="Serve large language models as microservices.",
        version=_version,
        help_epilogue=(
            "Every option can be set in the environment: STEPWIRE_MODEL, STEPWIRE_DTYPE, …; "
            "an option on the command line wins."
        ),
        help_format="plaintext",
        config=cyclopts.config.Env("STEPWIRE_", command=False),
        default_parameter=cyclopts.Parameter(show_env_var=False, negative_iterable=()),
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    for name, help_text in COMMANDS.items():
        app.command(f"stepwire_client.cli.{name}:{name}", name=name, help=help_text)
    return app


def main() -> NoReturn:
    """Run the command that sys.argv names, and exit."""
    # gRPC's own log would mix with the answer; errors come as exceptions.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # A terminated command cleans up like an interrupted one.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = build_app()(sys.argv[1:], exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        fail(_usage_error(error), code=2)
    except SettingError as error:
        fail(str(error), code=2)
    except StepwireError as error:
        fail(str(error))
    except (KeyboardInterrupt, EOFError):
        fail("interrupted", code=130)
    except BrokenPipeError:
        # Whoever read the output has gone; the interpreter must not try to flush it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("STEPWIRE_TRACEBACK"):
            raise
        kind = type(error).__name__
        fail(f"a fault of stepwire ({kind}: {error}); STEPWIRE_TRACEBACK=1 shows where")
    sys.exit(result if isinstance(result, int) else 0)


def fail(message: str, *, code: int = 1) -> NoReturn:
    """Print one line and exit."""
    print(f"stepwire: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _version() -> str:
    from importlib import metadata

    return metadata.version("stepwire")


def _usage_error(error: cyclopts.CycloptsError) -> str:
    if isinstance(error, cyclopts.UnusedCliTokensError):
        unused = " ".join(error.unused_tokens or ())
        return f"too many arguments ({unused}): put quotes around a text of several words"
    if isinstance(error, cyclopts.UnknownCommandError):
        # Its own text would import every command to name them.
        given = " ".join(error.unused_tokens or ())
        return f"no command is called {given}: there are {', '.join(COMMANDS)}"
    return f"{str(error).rstrip('.')}; --help lists what there is"


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
