"""A file is replaced whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterable

__all__ = ["replace_file"]


def replace_file(path: str | bytes | os.PathLike[str], chunks: Iterable[memoryview]) -> None:
    """Writes the chunks, one after the other, as the file at `path`; a symbolic link is followed and stays.

    Owns:   a file of a random name in the same folder, which is renamed once all of it is on the disk. Whoever reads
            meanwhile or after a crash finds the old file or the new one. It has the permission bits of the file it
            replaces, from before its first byte on, and where there was none those that the umask leaves.
    Raises: OSError, and whatever else interrupts it: the old file is then unchanged and the new one gone. But where the
            last step alone fails, the sync of the folder, the new file is in place and not yet certain to stay there.
    """
    target = os.path.realpath(os.fsdecode(path))
    mode = _mode_of(target)
    folder = os.open(os.path.dirname(target), os.O_RDONLY | os.O_DIRECTORY)
    try:
        _write_and_rename(target, mode, chunks)
        os.fsync(folder)
    finally:
        os.close(folder)


def _mode_of(target: str) -> int | None:
    """The permission bits of the file there, None where there is none; refuses what is no regular file."""
    try:
        status = os.stat(target)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", target)
    return status.st_mode & 0o777


def _write_and_rename(target: str, mode: int | None, chunks: Iterable[memoryview]) -> None:
    # The name is not made from the target's, which may already be as long as a name can be.
    temporary = os.path.join(os.path.dirname(target), f".tiles-{secrets.token_hex(8)}.tmp")
    try:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else 0o600)
        try:
            if mode is not None:
                os.fchmod(file, mode)
            for chunk in chunks:
                _write(file, chunk)
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _write(file: int, chunk: memoryview) -> None:
    # One call writes at most 2 GiB, and less where the disk is nearly full.
    while len(chunk):
        chunk = chunk[os.write(file, chunk) :]
