"""Errors a person can act on: each has one message; the command line prints it and exits with `exit_code`."""

from __future__ import annotations


class SuiteError(Exception):
    """Base of all errors that the suite raises on purpose."""

    exit_code = 1


class ConfigError(SuiteError):
    """The request cannot work as written: found before any heavy work."""

    exit_code = 2


class PluginError(SuiteError):
    """A plugin broke its contract or raised; the message names plugin, version and hook."""

    exit_code = 2


class RuleError(ConfigError):
    """The active plugins may not be combined; the message gives the rule and its reason."""


class NoOpError(SuiteError):
    """A plugin that was asked for by name did nothing during the run."""

    exit_code = 3


class EmptyError(SuiteError):
    """The run came out without content, such as a field without a surface; what lies beside the result is kept."""

    exit_code = 3


class RankError(SuiteError):
    """Another rank of the run is gone: it died, or gave no answer in time."""

    exit_code = 2


class NumericsError(SuiteError):
    """Numbers of a run became NaN or infinite; nothing that was made of them is given out."""

    exit_code = 2


class OutputError(SuiteError, OSError):
    """A result could not be written; what was already written stays."""

    exit_code = 2


class TakenError(OutputError):
    """A file of this name came to be while the run went on; it is not replaced."""


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine has no memory left: nobody's fault, and its message says what to do."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
