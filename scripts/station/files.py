"""Files and folders that appear whole or not at all: write beside, flush, rename."""

import ctypes
import errno
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from station.errors import SettingError

# What begins like this is ours, is not yet or no longer part of the data, and may be removed when nothing runs.
UNFINISHED = ".labelstation-"

# linux/fs.h and fcntl.h; Python has neither call.
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)

_CHUNK_BYTES = 1 << 20


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Make an output folder that cannot be written an error of one line.

    Raises:
        SettingError: names the place and the reason.
    """
    try:
        yield
    except OSError as error:
        place = error.filename or folder
        raise SettingError(
            f"cannot write {place}: {error.strerror}: name another folder, or make room and give this user the right "
            "to write there"
        ) from None


def json_text(value: object, indent: int | None = None) -> str:
    """A JSON text in Unicode NFC, keys in the order given.

    Raises:
        ValueError: a number is infinite or not a number, which JSON cannot say.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    if unicodedata.is_normalized("NFC", text):
        return text
    return json.dumps(_nfc(value), ensure_ascii=False, indent=indent, allow_nan=False)


def json_document(value: object) -> bytes:
    """The bytes of a JSON file that people can read: UTF-8, indented, one newline at the end."""
    return f"{json_text(value, indent=2)}\n".encode()


def _nfc(value: object) -> object:
    """The same JSON value with every text in it in NFC.

    Normalising the finished JSON instead would break it: the `n` of an escaped newline takes a tilde that follows.
    """
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, dict):
        return {_nfc(key): _nfc(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_nfc(member) for member in value]
    return value


def write_file(path: Path, content: bytes) -> None:
    """Write a new file, not yet flushed."""
    with path.open("xb") as file:
        file.write(content)


def replace_file(path: Path, chunks: Iterable[bytes]) -> bool:
    """Replace a file by one that is whole, unless it already holds just these bytes.

    Returns:
        whether the file changed.
    """
    beside = path.with_name(f"{UNFINISHED}{path.name}")
    with beside.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        if _same_content(beside, path):
            beside.unlink()
            return False
        os.fsync(file.fileno())
    beside.replace(path)
    flush_names(path.parent)
    return True


def _same_content(left: Path, right: Path) -> bool:
    if not right.is_file() or left.stat().st_size != right.stat().st_size:
        return False
    with left.open("rb") as left_file, right.open("rb") as right_file:
        while chunk := left_file.read(_CHUNK_BYTES):
            if chunk != right_file.read(_CHUNK_BYTES):
                return False
    return True


def flush_file_system(folder: Path) -> None:
    """Wait until everything written to the folder's file system is on disk: one call for a batch of files.

    Raises:
        OSError: something could not be written.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    finally:
        os.close(descriptor)


def flush_names(folder: Path) -> None:
    """Wait until what was created, renamed or removed in a folder is so on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_folder(new: Path, place: Path) -> None:
    """Rename a finished folder into its place; what was there gets the new one's old name.

    Both names are on one file system. A reader sees the old folder or the new one. Only where the file system cannot
    exchange two names (NFS, for one) is there an instant between two renames at which it sees neither; a process
    killed then leaves both folders beside the new one's old name.
    """
    try:
        new.rename(place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    else:
        return
    if not _exchange(new, place):
        aside = new.with_name(f"{new.name}.old")
        place.rename(aside)
        new.rename(place)
        aside.rename(new)


def _exchange(left: Path, right: Path) -> bool:
    """Exchange two names at one instant; says whether the file system can."""
    names = os.fsencode(left), os.fsencode(right)
    if _libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(right))
