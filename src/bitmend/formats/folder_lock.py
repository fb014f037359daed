"""One run at a time in one folder.

The lock is the operating system's on the folder itself: it ends with the process, however that ends, so that no stale lock
file can be left behind.
"""

import fcntl
import os
import weakref
from pathlib import Path

from bitmend.errors import RequestError


class FolderLock:
    """Holds a folder until `release`, or until the process ends.

    A file system that knows no locks (some network ones) gives none: `held` is False there, and two runs at once are not
    noticed.
    """

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            RequestError: another run holds it.
            OSError: the folder cannot be opened.
        """
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._close = weakref.finalize(self, os.close, descriptor)
        self.held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            raise RequestError(
                f"another run is writing {folder}; wait until it has ended, or choose another output"
            ) from None
        except OSError:
            self.held = False
        if not _is_still(descriptor, folder):
            self._close()
            raise RequestError(
                f"another run has just finished or replaced {folder}; look at what it left, and run again"
            )

    def release(self) -> None:
        """Let others in; may be called twice."""
        self._close()


def _is_still(descriptor: int, folder: Path) -> bool:
    """Return whether the opened folder still has that name: its holder may have removed it before it let go."""
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False
