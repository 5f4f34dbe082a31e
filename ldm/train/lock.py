"""A lock on a run's folder, so that only one process at a time trains in it."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only

from ldm.errors import InputError

log = logging.getLogger(__name__)

HELD: set[Path] = set()  # by this process: a record lock does not exclude the process that has it
BUSY = (errno.EACCES, errno.EAGAIN)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within this context no other process can train in `folder`. In a run of several processes the first has the lock.

    Raises `InputError` if another process has the lock. It is a record lock on `<folder>/.lock`: the kernel releases it
    when the process ends for any reason, child processes do not inherit it, and NFS shares it with other machines. The
    file stays and says which process had the lock last.
    """
    if rank_zero_only.rank:
        yield
        return
    path = folder.resolve() / ".lock"
    if path in HELD:
        raise InputError(f"this process trains in {folder} already")
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in BUSY:
                log.warning("%s: no lock on this file system (%s); do not start a second -r on this run", folder, error)
            else:
                file.seek(0)
                raise InputError(
                    f"{folder} is in use: {file.read().strip() or 'another process'} trains in it; wait for its end "
                    "or stop it with Ctrl-C"
                ) from None
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        HELD.add(path)
        try:
            yield
        finally:
            HELD.discard(path)
