"""Files that appear under their names when they are complete, and not before."""

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .errors import ArgumentError, OutputExistsError, TallcodecError, WriteError, label
from .machine import memory


class Partial(NamedTuple):
    """A file in the making, and one that says how far it is."""

    file: BinaryIO
    journal: BinaryIO | None = None


@contextmanager
def atomic_file(path: str | os.PathLike, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A new binary file, open for writing and reading, that appears under ``path`` when complete.

    The file is written beside ``path``; when the block ends it is synced to disk and renamed.
    When the block raises, nothing is left and what was at ``path`` is as it was. Whoever writes
    through ``fileno()`` leaves the buffered ``write()`` alone, or flushes first.

    Raises OutputExistsError when ``path`` exists and ``overwrite`` is false, even if it came to
    exist meanwhile, or when it is not a regular file; WriteError for the operating system's.
    """
    check_output(path, overwrite)
    target = Path(os.path.realpath(path))  # a link stays one, and what it points to is replaced
    temporary = temporary_sibling(target)
    with write_errors(path):
        try:
            with synced_file(temporary) as file:
                yield file
            place(temporary, target, overwrite)
            sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def resumable_file(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Partial]:
    """As :func:`atomic_file`, but when the block raises, or the process is killed, what was written
    stays beside ``path``, as `NAME.partial` and `NAME.partial.journal`, and is there again the next
    time; but for an ArgumentError the first time, which would be raised again.

    Raises WriteError, too, while another process has it open, and where those files are not ones
    that this function has left.
    """
    check_output(path, overwrite)
    target = Path(os.path.realpath(path))
    partial = target.with_name(target.name + ".partial")
    name = target.with_name(target.name + ".partial.journal")
    with write_errors(path), ExitStack() as stack:
        journal = stack.enter_context(_open_locked(name))
        is_new, file = not _size(journal), None
        try:
            file = stack.enter_context(_open_partial(partial, target, is_new))
            if not _size(file):
                os.ftruncate(journal.fileno(), 0)  # there is nothing that it could speak of
            yield Partial(file, journal)
            _sync(file)
            place(partial, target, overwrite)
        except BaseException as error:
            if not _size(journal) or (is_new and isinstance(error, ArgumentError)):
                if file is not None:
                    partial.unlink(missing_ok=True)
                name.unlink(missing_ok=True)
            raise
        name.unlink(missing_ok=True)
        sync_folder(target.parent)


@contextmanager
def changed_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """An existing file, open for reading and writing, that no one else who asks so may change or
    replace meanwhile. Readers need not ask.

    Raises WriteError: at once while another does, and where the file is missing or may not be
    written.
    """
    with write_errors(path), ExitStack() as stack:
        try:
            file = stack.enter_context(_locked(path, "r+b"))
        except FileNotFoundError as error:
            raise WriteError(error.errno, f"{label(path)}: there is no such file") from error
        yield file


@contextmanager
def replaced_file(path: str | os.PathLike) -> Iterator[None]:
    """Keep others from changing a file, where there is one, that is to be replaced: what they did
    would be lost. Raises WriteError where one does."""
    with ExitStack() as stack:
        try:
            stack.enter_context(_locked(path, "rb"))
        except WriteError:
            raise
        except OSError:  # there is none, or none that anybody could change who cannot read it
            pass
        yield


@contextmanager
def _locked(path: str | os.PathLike, mode: str) -> Iterator[BinaryIO]:
    """The file of a name, open, kept from others who would lock it. Raises WriteError where one has
    it so, and what opening it does."""
    while True:
        with open(os.path.realpath(path), mode, buffering=0) as file:
            _lock(file, path)
            try:
                if _is_at(file, path):  # whoever had it may have put another one in its place
                    yield file
                    return
            finally:
                with suppress(OSError):  # closing is not enough where the file is mapped, too
                    fcntl.flock(file, fcntl.LOCK_UN)


def _lock(file: BinaryIO, path: str | os.PathLike) -> None:
    """On file systems without locks nobody is kept from anything."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise WriteError(error.errno, f"{path}: another process is writing it") from error
    except OSError:
        pass


def _is_at(file: BinaryIO, path: str | os.PathLike) -> bool:
    """Whether an open file is still the one of that name."""
    return os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno()))


def check_output(path: str | os.PathLike, overwrite: bool) -> None:
    """Raise OutputExistsError where :func:`atomic_file` would, as far as can be told beforehand."""
    if not overwrite and os.path.lexists(path):
        raise exists_error(Path(path))
    if os.path.exists(path) and not os.path.isfile(path):
        raise OutputExistsError(f"{path}: exists and is not a regular file: remove it yourself")


@contextmanager
def synced_file(path: Path) -> Iterator[BinaryIO]:
    """A new file, with the permissions the umask leaves, that is on disk when the block ends."""
    with open(path, "x+b") as file:
        yield file
        file.flush()
        _sync(file)


def _open_own(path: Path) -> BinaryIO:
    """A file of this user's that has no other name, or a new one."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_uid != os.geteuid():
        file.close()
        raise WriteError(
            errno.EEXIST, f"{path}: is no file that an interrupted encoding left: move it away"
        )
    return file


def _open_locked(path: Path) -> BinaryIO:
    """A file that no other process has open so, under its name."""
    while True:
        file = _open_own(path)
        try:
            _lock(file, path)
        except WriteError:
            file.close()
            raise
        if _is_at(file, path):
            return file
        file.close()  # whoever had it is done, and has removed it


def _open_partial(path: Path, target: Path, is_new: bool) -> BinaryIO:
    if path.exists() and target.exists() and os.path.samefile(path, target):
        path.unlink()  # a process was killed when all was done but this
    file = _open_own(path)
    if is_new and _size(file):
        file.close()
        raise WriteError(
            errno.EEXIST, f"{path}: is there without the journal of an encoding: move it away"
        )
    return file


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _sync(file: BinaryIO) -> None:
    os.fsync(file.fileno())
    if _size(file) > memory() // 2:
        # Little else would be left in the page cache.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def place(temporary: Path, path: Path, overwrite: bool) -> None:
    """Give a complete file its name; without ``overwrite``, only if nothing has that name."""
    if overwrite:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)  # unlike a rename, it never replaces
    except FileExistsError as error:
        raise exists_error(path) from error
    except OSError:  # a file system without links: claim the name, then replace what we own
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC))
        except FileExistsError as error:
            raise exists_error(path) from error
        try:
            os.replace(temporary, path)
        except BaseException:
            path.unlink()
            raise
    else:
        temporary.unlink()


def temporary_sibling(path: Path) -> Path:
    # Names the output, if a killed process leaves it behind, and is short whatever that is called.
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.tmp")


def sync_folder(folder: Path) -> None:
    """Make a rename that has happened survive a crash, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into a WriteError that names ``path``."""
    try:
        yield
    except TallcodecError:  # a ReadError is an OSError too
        raise
    except OSError as error:
        folder = Path(path).parent
        why = error if folder.is_dir() else f"there is no folder {folder}: make it first"
        result = WriteError(f"{path}: cannot be written: {why}")
        result.errno, result.filename = error.errno, str(path)
        raise result from error


def exists_error(path: Path) -> OutputExistsError:
    result = OutputExistsError(
        f"{path}: exists already: choose another path, or allow it to be replaced (overwrite=True, "
        "--overwrite)"
    )
    result.errno, result.filename = errno.EEXIST, str(path)
    return result
