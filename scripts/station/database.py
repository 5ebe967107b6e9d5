"""Connections to the two databases, locks between scripts, and the record of each run."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql

from station.errors import ExitCode, SettingError, UnavailableError, exit_code_of
from station.settings import Settings
from station.task_types import TASK_TYPES, TaskType

Connection = psycopg.Connection[tuple[Any, ...]]

# A server that refuses a connection cannot be told from the SQLSTATE, which libpq drops, but by what it says: a wrong
# password, role, database or right, unless it is one of these.
_REFUSES_FOR_NOW = ("starting up", "shutting down", "recovery", "not yet accepting", "too many", "connection slots")
_LOCK_WAIT_SECONDS = 10


def connect(settings: Settings, setting: str, script: str) -> Connection:
    """Connect with the DSN of one setting; every statement outside `connection.transaction()` stands for itself.

    Args:
        settings: where the DSN is.
        setting: field of Settings that holds the DSN, such as `data_factory_dsn`.
        script: seen in pg_stat_activity as `labelstation-<script>`.

    Raises:
        SettingError: the DSN is missing, or its role, password or database is wrong.
        UnavailableError: the server does not answer.
    """
    dsn = settings.require(setting)
    try:
        connection = psycopg.connect(
            dsn,
            autocommit=True,
            connect_timeout=10,
            application_name=f"labelstation-{script}",
            # A script that was killed must not go on inside the server.
            options="-c client_connection_check_interval=1s -c idle_in_transaction_session_timeout=15min"
            " -c lock_timeout=60s -c timezone=UTC"
            # Statements handle whole batches: they should sort in memory; compiling them takes longer than they do.
            " -c work_mem=64MB -c temp_buffers=64MB -c jit=off",
        )
    except psycopg.OperationalError as error:
        # The other lines are hints, and what each of several addresses said.
        reason = str(error).strip().partition("\n")[0]
        refused = "FATAL" in reason or "no password supplied" in reason
        if refused and not any(words in reason for words in _REFUSES_FOR_NOW):
            raise SettingError(f"{setting.upper()}: {reason}: correct the setting, or run sql/cluster.sql") from None
        raise UnavailableError(f"PostgreSQL does not answer at {setting.upper()}: {reason}; is it running?") from None
    return connection


def connect_data_factory(settings: Settings, script: str) -> Connection:
    """Connect to data_factory and make sure that it has the schema.

    Raises:
        SettingError: it is another database, or `migrate` has not been run.
        UnavailableError: the server does not answer.
    """
    connection = connect(settings, "data_factory_dsn", script)
    # The last thing that the migrations make.
    row = connection.execute("SELECT to_regclass('v_annotator_accuracy') IS NOT NULL, current_database()").fetchone()
    if row is None or not row[0]:
        name = row[1] if row else "?"
        connection.close()
        raise SettingError(
            f"DATA_FACTORY_DSN: database {name} does not have labelstation's schema: run `make migrate`, "
            "or name the right database"
        )
    return connection


@contextmanager
def exclusive(connection: Connection, what: str) -> Iterator[None]:
    """Hold a lock that one script at a time can have, on whichever host it runs.

    Waits a little, because the server notices only after a moment that a killed holder has gone.

    Raises:
        UnavailableError: another run still holds it.
    """
    key = f"labelstation {what}"
    connection.execute(sql.SQL("SET lock_timeout = {}").format(f"{_LOCK_WAIT_SECONDS}s"))
    try:
        connection.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [key])
    except psycopg.errors.LockNotAvailable:
        raise UnavailableError(f"another {what} is running: wait until it has ended") from None
    connection.execute("RESET lock_timeout")
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute("SELECT pg_advisory_unlock(hashtextextended(%s, 0))", [key])


@dataclass
class Run:
    """One run of a script, as table `runs` remembers it."""

    run_id: int
    counts: dict[str, object] = field(default_factory=dict)


@contextmanager
def recorded_run(connection: Connection, script: str, task_type: TaskType | None = None) -> Iterator[Run]:
    """Record that a script ran, how it ended and what it counted.

    The exit code of a run that ends without an error is `run.counts.pop("exit_code")`, else 0.
    """
    row = connection.execute(
        "INSERT INTO runs (script, task_type) VALUES (%s, %s) RETURNING run_id",
        [script, task_type.name if task_type else None],
    ).fetchone()
    assert row is not None
    run = Run(row[0])
    exit_code: int = ExitCode.UNEXPECTED
    try:
        yield run
        exit_code = int(str(run.counts.pop("exit_code", int(ExitCode.DONE))))
    except BaseException as error:
        exit_code = exit_code_of(error)
        raise
    finally:
        if not connection.closed:
            connection.execute(
                "UPDATE runs SET finished_at = clock_timestamp(), exit_code = %s, counts = %s WHERE run_id = %s",
                [exit_code, json.dumps(run.counts, default=str), run.run_id],
            )


def project_ids(connection: Connection, settings: Settings) -> Mapping[str, int]:
    """Label Studio project of each task type: the setting if given, else what setup_projects recorded.

    Returns:
        task type name → project id; task types without a project are missing.
    """
    known: dict[str, int] = dict(connection.execute("SELECT task_type::text, project_id FROM projects").fetchall())
    result: dict[str, int] = {}
    for task_type in TASK_TYPES.values():
        project_id = getattr(settings, task_type.project_setting.lower()) or known.get(task_type.name)
        if project_id is not None:
            result[task_type.name] = project_id
    return result


def project_id_of(connection: Connection, settings: Settings, task_type: TaskType) -> int:
    """Label Studio project of one task type.

    Raises:
        SettingError: there is none yet.
    """
    try:
        return project_ids(connection, settings)[task_type.name]
    except KeyError:
        raise SettingError(
            f"{task_type.name} has no Label Studio project: run `make setup-projects` or set "
            f"{task_type.project_setting}"
        ) from None
