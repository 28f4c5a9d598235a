"""The exceptions tallcodec raises. All derive from :class:`TallcodecError`.

Where Python has a built-in class for the case, the exception derives from it too,
so code that does not know tallcodec still catches what it expects to catch.
"""

import os


class TallcodecError(Exception):
    """Base class of everything tallcodec raises on purpose."""

    def __str__(self) -> str:  # KeyError would show the message's repr, OSError its number first
        return str(self.args[-1]) if self.args else ""


class ArgumentError(TallcodecError, ValueError):
    """An argument has a value that no call accepts."""


class CheckpointError(TallcodecError, ValueError):
    """A checkpoint that was to be encoded cannot be read or used."""


class FormatError(TallcodecError, ValueError):
    """The file is not a valid `.tall` file: damaged, truncated or not one at all."""


class VersionError(FormatError):
    """The file needs a newer reader: unknown version, plane kind or coding."""


class ChecksumError(FormatError):
    """Stored bytes do not match their checksum."""


class BaseMismatchError(TallcodecError, ValueError):
    """The base that was given is not the base the file was encoded against."""


class TaskMismatchError(TallcodecError, ValueError):
    """A checkpoint is not the one that a task was encoded from, or the task does not decode to what
    its file says of it."""


class TaskNotFoundError(TallcodecError, KeyError):
    """The file has no task of that name."""


class TensorNotFoundError(TallcodecError, KeyError):
    """The task has no tensor of that name."""


class TensorMismatchError(TallcodecError, ValueError):
    """A tensor given by the caller has the wrong dtype, shape or layout."""


class OutputExistsError(TallcodecError, FileExistsError):
    """The output path exists and overwriting was not asked for."""


class ReadError(TallcodecError, OSError):
    """The operating system failed to read an input, or it ended early."""


class WriteError(TallcodecError, OSError):
    """The operating system failed to write an output (a full disk, most often)."""


class DeviceError(TallcodecError, RuntimeError):
    """A GPU, or its driver, refused what was asked of it."""


class SwitchError(TallcodecError, RuntimeError):
    """A model cannot be switched now, or could not be put back."""


class ClosedError(TallcodecError, ValueError):
    """The file handle was closed."""


def label(path: str | os.PathLike) -> str:
    """A path as messages name it: with no bytes that are not UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")
