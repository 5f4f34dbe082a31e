"""Programs run in processes forked from one that has imported everything: a start costs milliseconds, not seconds.

A program's processes for further devices, which Lightning starts by its command line, are forked too: each child forks
a spare one before it begins, which waits until it is told its environment, or ends with its parent.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

from pytorch_lightning.strategies.launchers import subprocess_script
from pytorch_lightning.utilities import rank_zero_only

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 240  # seconds that a program may take


class ForkServer:
    """Starts the server with the first program; `run` is `subprocess.run` of Python on `words`."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment, self.server = environment, None

    def run(self, words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
        if self.server is None or self.server.poll() is not None:
            self._start()
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            request = json.dumps([words, environment]).encode()
            self.line.sendall(len(request).to_bytes(4, "big"))
            socket.send_fds(self.line, [request], [out.fileno(), err.fileno()])
            pid = int.from_bytes(self.line.recv(4), "big")
            try:
                code = int.from_bytes(self.line.recv(4), "big", signed=True)
            except TimeoutError:
                os.killpg(pid, signal.SIGKILL)
                self.server.kill()
                raise
            texts = [(stream.seek(0), stream.read().decode())[1] for stream in (out, err)]
        return subprocess.CompletedProcess(words, code, *texts)

    def _start(self) -> None:
        self.line, theirs = socket.socketpair()
        self.line.settimeout(LIMIT)
        command = [sys.executable, "-m", "tests.forkserver", str(theirs.fileno())]
        self.server = subprocess.Popen(command, cwd=ROOT, env=self.environment, pass_fds=[theirs.fileno()])
        theirs.close()


def serve(line: socket.socket) -> tuple[list[str], dict[str, str]]:
    """Fork a child for each request. Returns in the child, with its command line and environment."""
    while size := line.recv(4):
        request, fds, *_ = socket.recv_fds(line, int.from_bytes(size, "big"), 2)
        while len(request) < int.from_bytes(size, "big"):
            request += line.recv(2**16)
        if not (pid := os.fork()):
            os.setsid()
            line.close()
            for stream, fd in zip((1, 2), fds, strict=True):
                os.dup2(fd, stream), os.close(fd)
            with open(os.devnull) as nothing:
                os.dup2(nothing.fileno(), 0)
            return json.loads(request)
        for fd in fds:
            os.close(fd)
        line.sendall(pid.to_bytes(4, "big"))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        line.sendall(code.to_bytes(4, "big", signed=True))
    sys.exit()


class Spare(subprocess.Popen):
    """A child that was forked, for those who started a program."""

    def __init__(self, pid: int) -> None:
        self.pid, self.args, self.returncode, self._child_created = pid, [], None, True
        self.stdin = self.stdout = self.stderr = None
        self._waitpid_lock = threading.Lock()


def fork_a_spare() -> dict[str, str] | None:
    """Let Lightning start its second process by waking a spare one; the environment of that one, in that one."""
    theirs, ours = os.pipe()
    parent = os.getpid()
    if not (pid := os.fork()):
        os.close(ours)
        with open(theirs) as told:
            text = told.read()
        if not text or os.getppid() != parent:
            os._exit(0)
        return json.loads(text)
    os.close(theirs)

    def wake(command, env, cwd=None):
        with open(ours, "w") as line:
            json.dump(dict(env), line)
        return Spare(pid)

    subprocess_script.subprocess = SimpleNamespace(Popen=wake)
    return None


def run(words: list[str], environment: dict[str, str]) -> None:
    """Be `python <words>` in this process, as far as a program can tell."""
    os.environ.clear()
    os.environ.update(environment)
    if (more := fork_a_spare()) is not None:
        os.environ.update(more)
        rank_zero_only.rank = int(more["LOCAL_RANK"])
        for name in [name for name in sys.modules if name.split(".")[0] in ("ldm", "main_dream_booth")]:
            del sys.modules[name]  # what is imported again asks for the rank
    sys.argv = words
    match words:
        case ["-c", code, *_]:
            sys.argv = ["-c", *words[2:]]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *_]:
            sys.path[0] = str(Path(script).resolve().parent)
            runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    import main_dream_booth  # noqa: F401
    import sample  # noqa: F401
    from ldm.train import run as training  # noqa: F401

    run(*serve(socket.socket(fileno=int(sys.argv[1]))))
