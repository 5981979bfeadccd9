"""Runs a module as a process that does not outlive the one that started it.

    python -S child_process.py PARENT_PID PYTHON -m MODULE ARGUMENT...

On Linux the kernel kills the process when the thread that started it ends, whatever ended it;
elsewhere the starter's own clean-up has to do. Stands alone: nothing but the standard library.
"""

from __future__ import annotations

import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel for SIGKILL when the parent ends; exit where it has ended already.

    SIGKILL and not SIGTERM: nobody is left to wait for a clean end, and a process that hangs
    in native code would never come to one. prctl(2).
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # Between fork and prctl the parent may have died without a signal for us.
    if os.getppid() != parent_pid:
        sys.exit(1)


def main() -> None:
    """Bind to the parent, then become the command."""
    command = sys.argv[2:]
    die_with_parent(int(sys.argv[1]))
    os.execv(command[0], command)  # noqa: S606  # the point of this module


if __name__ == "__main__":
    main()
