"""What every script's command line has in common."""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psycopg
from rich.console import Console
from rich.progress import Progress

from station.errors import ExitCode, StationError, TerminatedError, exit_code_of
from station.task_types import TASK_TYPES, task_type_argument

log = logging.getLogger("labelstation")

# sd-daemon(3): journald reads a line's priority from this prefix.
_JOURNAL_PRIORITIES = ((logging.ERROR, "<3>"), (logging.WARNING, "<4>"), (logging.INFO, "<6>"), (0, "<7>"))


class _JournalFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = next(text for level, text in _JOURNAL_PRIORITIES if record.levelno >= level)
        return prefix + super().format(record).replace("\n", "\n" + prefix)


class _ConsoleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        name = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return name + super().format(record)


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every script has."""
    result = argparse.ArgumentParser(description=description, allow_abbrev=False)
    result.add_argument("-v", "--verbose", action="store_true", help="say more on stderr")
    result.add_argument("--json", action="store_true", help="print the result as JSON")
    result.add_argument(
        "--env-file",
        type=Path,
        default=Path(os.environ.get("LABELSTATION_ENV_FILE") or ".env"),
        metavar="FILE",
        help="file with settings that the environment does not give (default: .env)",
    )
    return result


def add_task_type(options: argparse.ArgumentParser, *, required: bool) -> None:
    """Add `--task-type`; without it `required=False` means all task types."""
    options.add_argument(
        "--task-type",
        type=task_type_argument,
        required=required,
        metavar="TYPE",
        help=" | ".join(TASK_TYPES) + ("" if required else " (default: all)"),
    )


def add_dry_run(options: argparse.ArgumentParser) -> None:
    """Add `--dry-run`."""
    options.add_argument("-n", "--dry-run", action="store_true", help="say what would be done and change nothing")


def positive(value: str) -> int:
    """An argument that must be a whole number above zero."""
    number = int(value) if value.isascii() and value.isdigit() else 0
    # PostgreSQL counts with 64 bits.
    if not 0 < number < 2**63:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number above 0")
    return number


def add_limit(options: argparse.ArgumentParser, what: str) -> None:
    """Add `--limit`."""
    options.add_argument("--limit", type=positive, metavar="N", help=f"at most N {what}")


@contextmanager
def progress(what: str, total: float) -> Iterator[Callable[[float], None]]:
    """Show a bar on stderr, if that is a terminal; yields what tells it how far the work has come."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(what, total=total)
        yield lambda completed: bars.update(bar, completed=completed)


def print_result(options: argparse.Namespace, result: Mapping[str, object], lines: list[str]) -> None:
    """Print the result of a script on stdout: as JSON for machines, as lines for people."""
    for line in [json.dumps(result, ensure_ascii=False, default=str)] if options.json else lines:
        # Flushed, so that a reader who has gone is noticed here and not when Python shuts down.
        print(line, flush=True)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise TerminatedError


def run(options: argparse.ArgumentParser, job: Callable[[argparse.Namespace], ExitCode]) -> None:
    """Parse the arguments, do the job and exit; expected errors become one line and their exit code."""
    arguments = options.parse_args()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _JournalFormatter("%(message)s") if "JOURNAL_STREAM" in os.environ else _ConsoleFormatter("%(message)s")
    )
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if arguments.verbose else logging.INFO)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = job(arguments)
    except StationError as error:
        log.error("%s", error)
        code = exit_code_of(error)
    except psycopg.OperationalError as error:
        # Opening a connection has its own messages; this one broke while it was in use.
        log.error("PostgreSQL broke off: %s; run this again", str(error).strip().partition("\n")[0])
        code = exit_code_of(error)
    except KeyboardInterrupt as error:
        code = exit_code_of(error)
    except BrokenPipeError:
        # Whoever read stdout has gone; the work itself is committed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = ExitCode.DONE
    sys.exit(code)
