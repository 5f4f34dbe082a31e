"""One process at a time trains in a run's folder."""

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

HELD: set[Path] = set()  # by this process, which its own record locks do not stop
BUSY = (errno.EACCES, errno.EAGAIN)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within this context no other process trains in `folder`; of several processes of one run the first has the lock.

    Raises `InputError` if another one does. The lock is a record lock on `<folder>/.lock`: the kernel drops it when
    the process ends, however it ends, its children do not inherit it, and NFS passes it on to other machines. The file
    stays; it says who had the lock last.
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
                log.warning("%s: no lock on this file system (%s); start no second -r on this run", folder, error)
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
