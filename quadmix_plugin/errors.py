"""The errors that a user may see, each with the exit code of the command line.

A message says what is wrong, where, with which value, and what to do about it.
"""


class QuadmixError(Exception):
    """A failure with a remedy in its message; ends the command with ``exit_code``."""

    exit_code = 1


class InputError(QuadmixError):
    """A corpus, score table or model that cannot be used as it is."""


class RecipeError(QuadmixError):
    """A recipe that is not valid; found before any work starts."""

    exit_code = 78


class UsageError(QuadmixError):
    """A command line that cannot be carried out."""

    exit_code = 2


class StorageError(QuadmixError):
    """A run directory that cannot be written: full, read-only or in use."""

    exit_code = 74


class RunLockedError(StorageError):
    """Another process works in this run directory."""

    exit_code = 1
