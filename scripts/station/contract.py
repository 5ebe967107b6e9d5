"""What the scripts read in Label Studio's own database: the only tables and columns they may touch.

A Label Studio that lacks one of these, or gives it another type, is refused before anything is read.
Holds for the version of Label Studio named below.
"""

from datetime import datetime
from typing import Any

from psycopg import sql

from station.database import Connection
from station.errors import SettingError
from station.label_studio import LabelStudio

# The version of Label Studio that the columns were last checked with.
VERSION = "1.23.2"

# Where our own key of a task is in its meta.
KEY = "labelstation_key"

COLUMNS: dict[str, dict[str, str]] = {
    "project": {"id": "integer", "title": "character varying", "created_at": "timestamp with time zone"},
    "task": {
        "id": "integer|bigint",
        "meta": "jsonb",
        "project_id": "integer",
        "created_at": "timestamp with time zone",
        "updated_at": "timestamp with time zone",
        "total_annotations": "integer",
        "cancelled_annotations": "integer",
    },
    "task_completion": {
        "id": "integer|bigint",
        "result": "jsonb",
        "was_cancelled": "boolean",
        "created_at": "timestamp with time zone",
        "updated_at": "timestamp with time zone",
        "task_id": "integer|bigint",
        "project_id": "integer",
        "completed_by_id": "integer",
        "lead_time": "double precision",
        "draft_created_at": "timestamp with time zone",
        # PostgreSQL's own: which transaction wrote the row.
        "xmin": "xid",
    },
    "tasks_annotationdraft": {
        "id": "integer|bigint",
        "task_id": "integer|bigint",
        "annotation_id": "integer|bigint",
        "user_id": "integer",
        "created_at": "timestamp with time zone",
    },
    "tasks_tasklock": {
        "task_id": "integer|bigint",
        "user_id": "integer",
        "expire_at": "timestamp with time zone",
    },
}


def breaches(connection: Connection) -> list[str]:
    """Where the Label Studio database differs from the contract, as its reader sees it.

    Returns:
        one line a difference, empty when the contract holds.
    """
    seen = {
        (str(table), str(column)): str(data_type)
        for table, column, data_type in connection.execute(
            """
            SELECT c.relname, a.attname, format_type(a.atttypid, NULL)
            FROM pg_attribute AS a
            INNER JOIN pg_class AS c ON c.oid = a.attrelid
            WHERE c.oid = ANY (SELECT to_regclass(name) FROM unnest(%s::text[]) AS name)
                AND NOT a.attisdropped AND has_column_privilege(c.oid, a.attnum, 'SELECT')
            """,
            [list(COLUMNS)],
        ).fetchall()
    }
    result = []
    for table, columns in COLUMNS.items():
        for column, data_type in columns.items():
            found = seen.get((table, column))
            if found is None:
                result.append(f"{table}.{column} is missing or may not be read")
            elif found not in data_type.split("|"):
                result.append(f"{table}.{column} is {found}, not {data_type.replace('|', ' or ')}")
    return result


def check(connection: Connection) -> None:
    """Refuse a database that is not a Label Studio these scripts can read.

    Raises:
        SettingError: names what differs.
    """
    found = breaches(connection)
    row = connection.execute("SELECT current_database()").fetchone()
    name = row[0] if row else "?"
    if len(found) == sum(len(columns) for columns in COLUMNS.values()):
        raise SettingError(
            f"LABEL_STUDIO_DSN: database {name} holds no Label Studio that may be read: is Label Studio "
            "running on SQLite (it needs DJANGO_DB=default), is it another database, or is `make migrate` "
            "still to be run?"
        )
    if found:
        raise SettingError(
            f"LABEL_STUDIO_DSN: database {name} is not as the scripts need it: {'; '.join(found)}: "
            "run `make migrate`, or go back to the version of Label Studio that worked"
        )


def check_same(connection: Connection, label_studio: LabelStudio, project_id: int) -> dict[str, Any]:
    """Refuse an address and a database that belong to different Label Studios; returns the project.

    Raises:
        SettingError: they do, or the project does not exist.
    """
    label_studio.version()
    project = label_studio.project(project_id)
    # The moment, too: every station gives its projects the same titles.
    here = (project["title"], datetime.fromisoformat(project["created_at"]))
    there = connection.execute("SELECT title, created_at FROM project WHERE id = %s", [project_id]).fetchone()
    if here != there:
        found = f"{there[0]!r} of {there[1]:%Y-%m-%d %H:%M:%S}" if there else "none"
        raise SettingError(
            f"LABEL_STUDIO_DSN and LABEL_STUDIO_URL are two different Label Studios: {label_studio.address} has "
            f"project {project_id} {here[0]!r} of {here[1]:%Y-%m-%d %H:%M:%S}, the database has {found}: correct one "
            "of the settings"
        )
    return project


def grant_reader(connection: Connection, reader: str) -> None:
    """Let the reading role see exactly the contract's columns; run as Label Studio's own role."""
    with connection.transaction():
        _grant(connection, sql.Identifier(reader))


def _grant(connection: Connection, role: sql.Identifier) -> None:
    connection.execute(sql.SQL("REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {}").format(role))
    connection.execute(sql.SQL("GRANT USAGE ON SCHEMA public TO {}").format(role))
    for table, columns in COLUMNS.items():
        connection.execute(
            sql.SQL("GRANT SELECT ({}) ON {} TO {}").format(
                sql.SQL(", ").join(map(sql.Identifier, columns)), sql.Identifier(table), role
            )
        )
