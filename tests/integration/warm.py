"""Commands that start warm: a process that has imported the libraries forks itself for each one.

A tutorial types some twenty commands; importing torch and transformers anew would be most of what each costs. Here the session is
the same shell with the same words, and `python`, `speft-train` and `speft-hub` on its PATH hand their words, folder, environment
and streams to the waiting process and return what its child returns. Unix only, as the suite is.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import socket
import stat
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("python", "speft-train", "speft-hub")
LIBRARIES = (
    "peft", "tensorboard.summary.writer.record_writer", "speft_hub.cli", "speft_hub.cli_make", "speft_hub.cli_publish",
    "speft_train.cli", "speft_train.steps",
)  # fmt: skip
CLIENT = f"""#!{sys.executable} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as line:
    line.connect(os.environ["WARM_SOCKET"])
    asked = json.dumps({{"words": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "folder": os.getcwd(), "environment": dict(os.environ)}})
    socket.send_fds(line, [len(asked.encode()).to_bytes(4, "big")], [0, 1, 2])
    line.sendall(asked.encode())
    sys.exit(line.recv(1)[0])
"""


@contextmanager
def warm_path(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of a session whose programs start warm; `folder` (outside the session's own) takes their files."""
    commands = folder / "bin"
    commands.mkdir(parents=True)
    for name in PROGRAMS:
        (commands / name).write_text(CLIENT)
        (commands / name).chmod(stat.S_IRWXU)
    place = folder / "socket"
    environment = os.environ | {"WARM_SOCKET": str(place), "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
    server = subprocess.Popen([sys.executable, __file__, str(place)], stdout=subprocess.PIPE, cwd=folder)
    try:
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        yield environment
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()


def serve(place: str) -> None:
    """Import what the commands need, then fork for each that asks; one at a time, as in a session."""
    for library in LIBRARIES:
        importlib.import_module(library)
    import transformers

    for lazy in ("Trainer", "AutoModelForSequenceClassification", "AutoTokenizer", "pipeline"):
        getattr(transformers, lazy)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place)
        listening.listen()
        print("ready", flush=True)
        while True:
            line, _ = listening.accept()
            with line:
                length, streams, _, _ = socket.recv_fds(line, 4, 3)
                asked = json.loads(line.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL))
                child = os.fork()
                if child == 0:
                    os._exit(_child(asked, streams))
                for stream in streams:
                    os.close(stream)
                _, status = os.waitpid(child, 0)
                line.sendall(bytes([os.waitstatus_to_exitcode(status) & 255]))


def _child(asked: dict[str, Any], streams: list[int]) -> int:
    """Become the command: its streams, folder, environment and words, then its exit code."""
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    program, *words = asked["words"]
    try:
        _start(program, words)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _start(program: str, words: list[str]) -> None:
    if program != "python":
        sys.argv = [program, *words]
        return sys.modules[program.replace("-", "_") + ".cli"].main()
    sys.argv = words
    sys.path[0] = os.path.dirname(words[0]) or os.getcwd()
    if words[0] == "-":
        exec(compile(sys.stdin.read(), "<stdin>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
