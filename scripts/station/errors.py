"""Exit codes, and the errors that end a script with one of them."""

from enum import IntEnum

import psycopg


class ExitCode(IntEnum):
    """What the exit status of every script means."""

    DONE = 0
    UNEXPECTED = 1
    USAGE = 2
    PARTIAL = 3
    PERSON_NEEDED = 4
    TRY_AGAIN = 75
    SETTING = 78
    INTERRUPTED = 130
    TERMINATED = 143


class StationError(Exception):
    """An expected error: its text is one line that says what is wrong, where, and what to do."""

    exit_code = ExitCode.UNEXPECTED


class UsageError(StationError):
    """The call's arguments cannot be carried out."""

    exit_code = ExitCode.USAGE


class SettingError(StationError):
    """A setting or a credential is missing or wrong."""

    exit_code = ExitCode.SETTING


class UnavailableError(StationError):
    """A service does not answer or a lock is held: running again later may work."""

    exit_code = ExitCode.TRY_AGAIN


class TerminatedError(KeyboardInterrupt):
    """SIGTERM came. A KeyboardInterrupt, because psycopg then cancels what the server is doing."""


class PersonNeededError(StationError):
    """Going on needs a person's decision."""

    exit_code = ExitCode.PERSON_NEEDED


def exit_code_of(error: BaseException) -> ExitCode:
    """The exit code of a script that this error ends."""
    if isinstance(error, StationError):
        return error.exit_code
    if isinstance(error, psycopg.OperationalError):
        return ExitCode.TRY_AGAIN
    if isinstance(error, TerminatedError):
        return ExitCode.TERMINATED
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    return ExitCode.UNEXPECTED
