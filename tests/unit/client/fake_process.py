"""Stands in for an executor or a scheduler: says where it listens, then does as told.

Run as: fake_process.py ROLE RECORD [--listen ADDRESS] [flags of the real process].
Writes its pid and arguments as one JSON line to RECORD. What it does comes from RECORD.ROLE:
"run", "refuse" (end at once with an error line), "silent", "stubborn" (ignores SIGTERM).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    role, record = sys.argv[1], Path(sys.argv[2])
    arguments = sys.argv[3:]
    with record.open("a") as opened:
        opened.write(json.dumps({"role": role, "pid": os.getpid(), "arguments": arguments}) + "\n")
    behaviour_file = record.with_suffix(f".{role}")
    behaviour = behaviour_file.read_text().strip() if behaviour_file.exists() else "run"
    if behaviour == "refuse":
        print(json.dumps({"event": "starting"}), file=sys.stderr)
        print(json.dumps({"event": "model refused", "error": "give --model"}), file=sys.stderr)
        sys.exit(1)
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if behaviour != "silent":
        listen = arguments[arguments.index("--listen") + 1]
        port = listen.rpartition(":")[2]
        print("some other line")
        print(f"listening on 127.0.0.1:{port if port != '0' else os.getpid()}", flush=True)
    while True:
        time.sleep(60)


main()
