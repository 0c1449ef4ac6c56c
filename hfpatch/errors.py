"""What can go wrong, as types. Every message says what happened, why, and how to go on."""

from __future__ import annotations


class HFPatchError(Exception):
    """Base of every error that hfpatch raises on purpose. `exit_code` is what the command line ends with."""

    exit_code = 1


class UnknownNameError(HFPatchError, LookupError):
    """A patcher, kernel, task, recipe or layer name that is not registered."""

    exit_code = 2


class ConfigError(HFPatchError, ValueError):
    """An option, recipe key or selector that is unknown, of the wrong type or out of range."""

    exit_code = 2


class UnsupportedError(HFPatchError):
    """The model, cache or call cannot be served correctly by this patch."""

    exit_code = 3


class ConflictError(HFPatchError):
    """Two patches want the same layers, or the same patch is on twice."""

    exit_code = 3


class DataMissingError(HFPatchError, FileNotFoundError):
    """A checkpoint, data file or result file is absent, half-written or corrupt."""

    exit_code = 1

    # FileNotFoundError formats itself from errno; ours is plain text.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class KernelUnavailableError(HFPatchError):
    """A kernel was asked for by name, or `strict=True` was set, and it refuses the call."""

    exit_code = 3


class HFPatchWarning(UserWarning):
    """A fallback or a limit that the user should know about; shown once per handle."""
