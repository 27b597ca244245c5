"""Every error and warning that convbasis raises."""

from __future__ import annotations


class ConvBasisError(Exception):
    """Base class of all convbasis errors."""


class InputError(ConvBasisError, ValueError):
    """An argument cannot be used; the message says what was given and what was wanted."""


class FileFormatError(ConvBasisError, ValueError):
    """A file is damaged, or was not written by convbasis."""


class MissingPathError(ConvBasisError, FileNotFoundError):
    """A file to read, or the folder of a file to write, does not exist."""


class MissingExtraError(ConvBasisError, ImportError):
    """A feature needs an optional dependency that is not installed."""

    def __init__(self, feature: str, extra: str, cause: ImportError) -> None:
        """Name the feature, the extra that brings it, and the module that was not found."""
        super().__init__(
            f"{feature} needs the extra [{extra}]: pip install 'convbasis[{extra}]' ({cause})"
        )


class DistributedError(ConvBasisError, RuntimeError):
    """The processes of one call do not fit together, or one died or hangs; it names the rank."""


class ConvBasisWarning(UserWarning):
    """Something still works, but a guarantee does not hold."""
