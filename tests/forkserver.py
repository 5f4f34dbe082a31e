"""Programs run in processes forked from one that has imported everything: a start costs milliseconds, not seconds.

A program's processes for further devices, which Lightning starts by its command line, are forked too: each child forks
a spare one before it begins, which waits until it is told its environment, or ends with its parent.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from pytorch_lightning.strategies.launchers import subprocess_script
from pytorch_lightning.utilities import rank_zero_only

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 240  # seconds that a program may take


class ForkServer:
    """Starts the server with the first program."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment, self.server = environment, None

    def run(self, words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
        """As `subprocess.run` of Python on `words` with what it writes as text."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = Process(self, self.ask(words, environment, fds=[out.fileno(), err.fileno()]))
            code = process.wait(LIMIT)
            texts = [(stream.seek(0), stream.read().decode())[1] for stream in (out, err)]
        return subprocess.CompletedProcess(words, code, *texts)

    def start(self, words: list[str], environment: dict[str, str]) -> Process:
        """As `subprocess.Popen` of Python on `words`, both streams in one pipe of text."""
        theirs, ours = os.pipe()[::-1]
        process = Process(self, self.ask(words, environment, fds=[theirs, theirs]), ours)
        os.close(theirs)
        return process

    def ask(self, *request, fds: Sequence[int] = ()) -> int:
        """What the server answers: the number of a new process, or how one ended."""
        if self.server is None or self.server.poll() is not None:
            self.line, theirs = socket.socketpair()
            command = [sys.executable, "-m", "tests.forkserver", str(theirs.fileno())]
            self.server = subprocess.Popen(command, cwd=ROOT, env=self.environment, pass_fds=[theirs.fileno()])
            theirs.close()
        text = json.dumps(request).encode()
        self.line.sendall(len(text).to_bytes(4, "big"))
        socket.send_fds(self.line, [text], fds)
        return int.from_bytes(self.line.recv(4), "big", signed=True)


class Process:
    """A program that a server started, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, server: ForkServer, pid: int, stream: int | None = None) -> None:
        self.server, self.pid, self.returncode = server, pid, None
        self.descriptor = os.pidfd_open(pid)
        self.stdout = None if stream is None else open(stream, errors="replace")

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self.descriptor], [], [], 0)[0]:
            self.returncode = self.server.ask(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not select.select([self.descriptor], [], [], timeout)[0]:
            os.killpg(self.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired([], timeout)
        return self.poll()

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        end = threading.Timer(timeout, os.killpg, (self.pid, signal.SIGKILL))
        end.start()
        with self.stdout:
            text = self.stdout.read()
        end.cancel()
        self.wait(timeout)
        return text, None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def serve(line: socket.socket) -> tuple[list[str], dict[str, str]]:
    """Fork a child for each command line, wait for a child for each number. Returns in a child."""
    while size := line.recv(4):
        text, fds, *_ = socket.recv_fds(line, int.from_bytes(size, "big"), 2)
        while len(text) < int.from_bytes(size, "big"):
            text += line.recv(2**16)
        request = json.loads(text)
        if not fds:
            answer = os.waitstatus_to_exitcode(os.waitpid(*request, 0)[1])
        elif not (answer := os.fork()):
            os.setsid()
            line.close()
            for stream, fd in zip((1, 2), fds, strict=True):
                os.dup2(fd, stream), os.close(fd)
            with open(os.devnull) as nothing:
                os.dup2(nothing.fileno(), 0)
            return request
        for fd in fds:
            os.close(fd)
        line.sendall(answer.to_bytes(4, "big", signed=True))
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
        usual = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for its parent
        with open(theirs) as told:
            text = told.read()
        signal.signal(signal.SIGINT, usual)
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
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
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
