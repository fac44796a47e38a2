"""A lock that the operating system takes back when all processes that hold it have ended."""

import fcntl
import os
import pathlib


class FileLock:
    """An exclusive lock on a file, which also says who holds or last held it.

    A process started with `pass_fds=(lock.descriptor,)` holds it too, until it ends.

    Args:
      path: the file; made if absent.
    """

    def __init__(self, path: pathlib.Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def acquire(self, owner: str, *, wait: bool = False) -> bool:
        """Takes the lock and writes `owner` into the file; False while another holds it."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, owner.encode(), 0)
        return True

    def close(self) -> None:
        """Gives up this process's part; a process that inherited the lock keeps it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def abandoned(path: pathlib.Path, owner: str) -> bool:
    """Whether `owner` was the last to take the lock and no process holds it any more."""
    try:
        if path.read_text() != owner:
            return False
    except FileNotFoundError:
        return False
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
