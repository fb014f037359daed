import fcntl
import signal
import subprocess
import sys
import textwrap

import pytest

from bitmend.errors import RequestError
from bitmend.formats.folder_lock import FolderLock


def test_one_at_a_time(tmp_path):
    lock = FolderLock(tmp_path)
    assert lock.held
    for _ in range(2):
        with pytest.raises(
            RequestError, match=r"another run is writing .*; wait until it has ended, or choose another"
        ):
            FolderLock(tmp_path)
    lock.release()
    lock.release()
    FolderLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_lock(tmp_path):
    script = f"""
        from pathlib import Path
        import signal, os
        from bitmend.formats.folder_lock import FolderLock
        lock = FolderLock(Path({str(tmp_path)!r}))
        print("locked", flush=True)
        signal.pause()
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(RequestError, match="another run is writing"):
        FolderLock(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    FolderLock(tmp_path).release()


def test_a_folder_that_has_been_replaced_meanwhile(tmp_path, monkeypatch):
    folder = tmp_path / "out.partial"
    folder.mkdir()

    def finish_meanwhile(descriptor, operation):
        folder.rename(tmp_path / "out")
        if again:
            folder.mkdir()

    monkeypatch.setattr(fcntl, "flock", finish_meanwhile)
    for again in (False, True):
        with pytest.raises(RequestError, match="another run has just finished or replaced"):
            FolderLock(folder)
        if not again:
            (tmp_path / "out").rename(folder)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert not FolderLock(tmp_path).held


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        FolderLock(tmp_path / "none")
