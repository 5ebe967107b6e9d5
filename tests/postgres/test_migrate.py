"""migrate.py: the schema comes to the same state whatever happened before, and data survives."""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest
from psycopg import sql

from station.local_services import POSTGRES_BIN, PROJECT, LocalPostgres
from support import Connection, add_sample, eventually, run_script, write_settings

STEPS = [file.name.removesuffix(".sql") for file in sorted((PROJECT / "sql" / "migrations").glob("*[a-z].sql"))]
STEPS = [step for step in STEPS if not step.endswith(".rollback")]


def schema(postgres: LocalPostgres, database: str) -> str:
    """The schema of a database, without what yoyo notes for itself."""
    done = subprocess.run(
        [
            str(POSTGRES_BIN / "pg_dump"), "-h", str(postgres.socket_directory), "-U", "postgres", "--schema-only",
            "--restrict-key=x", database,
        ],
        capture_output=True,
        text=True,
        check=True,
    )  # fmt: skip
    return done.stdout


def migrate(env_file: Path, *arguments: str, expect: int = 0) -> str:
    done = run_script("migrate", *arguments, env_file=env_file)
    assert done.returncode == expect, done.stderr
    return done.stdout + done.stderr


def settings(folder: Path, dsn: str) -> Path:
    file = folder / "migrate.env"
    file.write_text(f'DATA_FACTORY_OWNER_DSN="{dsn}"\n')
    return file


@pytest.fixture
def empty_database(postgres: LocalPostgres, schema_template: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of an empty database that labelstation_owner owns; it needs quoting everywhere."""
    assert schema_template
    name = f"empty %41/{abs(hash(request.node.nodeid)):x}"
    with psycopg.connect(postgres.dsn("postgres", "postgres"), autocommit=True) as admin:
        create = sql.SQL("CREATE DATABASE {} OWNER labelstation_owner TEMPLATE template0")
        admin.execute(create.format(sql.Identifier(name)))
        yield name
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def test_migrating_again_changes_nothing(postgres: LocalPostgres, data_factory: str, settings_file: Path) -> None:
    before = schema(postgres, data_factory)
    assert "CREATE TABLE public.samples" in before
    assert "applied: nothing to do" in migrate(settings_file)
    assert schema(postgres, data_factory) == before


def test_each_step_goes_back_and_forward_on_a_database_with_data(
    postgres: LocalPostgres, data_factory: str, settings_file: Path, db: Connection
) -> None:
    before = schema(postgres, data_factory)
    fill(db)
    texts = db.execute("SELECT version, text FROM revisions ORDER BY revision_id").fetchall()
    for steps in range(1, len(STEPS)):
        told = migrate(settings_file, "--rollback", str(steps))
        assert f"rolled back: {', '.join(reversed(STEPS[-steps:]))}" in told
        assert f"applied: {', '.join(STEPS[-steps:])}" in migrate(settings_file)
        assert schema(postgres, data_factory) == before
        assert db.execute("SELECT version, text FROM revisions ORDER BY revision_id").fetchall() == texts
        assert db.execute("SELECT count(*) FROM v_sync_status WHERE lock_status <> 'unlocked'").fetchone() == (
            (1,) if steps < len(STEPS) - 1 else (0,)
        )
        if steps == len(STEPS) - 1:
            fill_tasks(db)
    assert "nothing" not in migrate(settings_file, "--rollback", "99")
    with pytest.raises(psycopg.errors.UndefinedTable):
        db.execute("SELECT FROM samples")
    migrate(settings_file)
    assert schema(postgres, data_factory) == before


def fill(db: Connection) -> None:
    """Something in every table that refers to another."""
    add_sample(db, "a")
    db.execute("INSERT INTO runs (script) VALUES ('ingest')")
    fill_tasks(db)


def fill_tasks(db: Connection) -> None:
    for statement in (
        "SELECT lock_sample_for_annotation(sample_id) FROM samples",
        "SELECT set_gold_standard(sample_id) FROM samples",
        "INSERT INTO projects VALUES ('translation_review', 7)",
        "INSERT INTO tasks (sample_id, task_type, project_id, label_studio_task_id, state, gold_id) "
        "SELECT sample_id, 'transcript_correction', 1, 1, 'done', gold_id FROM gold_references",
        "INSERT INTO task_showings (task_key, sync_version) SELECT task_key, 1 FROM tasks",
        "INSERT INTO annotators VALUES (1, 1)",
        "INSERT INTO submitted_annotations (label_studio_annotation_id, task_key, annotator_id, status, result, "
        "began_at, submitted_at, changed_at) SELECT 1, task_key, 1, 'completed', '[]', now(), now(), now() FROM tasks",
        "UPDATE revisions SET annotation_id = a.annotation_id FROM submitted_annotations AS a",
        "INSERT INTO sample_changes (sample_id, sync_version, kind, source, task_key) "
        "SELECT sample_id, 99, 'transcript', 'human', task_key FROM tasks ON CONFLICT DO NOTHING",
        "INSERT INTO exports (destination, task_type, sample_id, revision_id, entry) "
        "SELECT '/x', 'transcript_correction', sample_id, revision_id, '{}' FROM revisions LIMIT 1",
        "INSERT INTO gold_exposures SELECT gold_id, task_key, 1, now() FROM tasks",
        "INSERT INTO gold_scores (gold_id, annotation_id, scorer, score, measures) "
        "SELECT gold_id, annotation_id, 'x', 1, '{}' FROM gold_references, submitted_annotations",
        "INSERT INTO webhook_events (action) VALUES ('x')",
    ):
        db.execute(statement.encode())


def test_a_dry_run_only_tells(postgres: LocalPostgres, empty_database: str, tmp_path: Path) -> None:
    env_file = settings(tmp_path, postgres.dsn("labelstation_owner", empty_database))
    assert f"would be applied: {', '.join(STEPS)}" in migrate(env_file, "--dry-run")
    assert "CREATE TABLE public.samples" not in schema(postgres, empty_database)


def test_a_migration_that_is_killed_or_run_twice_at_once_ends_whole(
    postgres: LocalPostgres, data_factory: str, empty_database: str, tmp_path: Path
) -> None:
    dsn = postgres.dsn("labelstation_owner", empty_database)
    env_file = settings(tmp_path, dsn)

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, str(PROJECT / "scripts" / "migrate.py"), "--env-file", str(env_file)]
        return subprocess.Popen(command, env={"PATH": os.environ["PATH"]}, stderr=subprocess.PIPE, text=True)

    with psycopg.connect(postgres.dsn("postgres", empty_database), autocommit=True) as admin:
        # The first step waits to learn whether there will be a type of this name.
        with psycopg.connect(dsn) as blocker:
            blocker.execute("CREATE TYPE task_type AS ENUM ()")
            with start() as killed:
                eventually(partial(waits, admin), "migrate at work")
                killed.kill()
            blocker.rollback()
        assert admin.execute("SELECT to_regclass('samples')").fetchone() == (None,)
    with start() as first, start() as second:
        codes = {first.wait(timeout=120), second.wait(timeout=120)}
    assert codes <= {0, 75}
    assert 0 in codes
    migrate(env_file)
    assert schema(postgres, empty_database) == schema(postgres, data_factory)


def waits(db: Connection) -> bool:
    """Whether a migration waits for a lock other than the one that keeps two of them apart."""
    row = db.execute(
        """
        SELECT FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock' AND wait_event <> 'advisory'
        """
    ).fetchone()
    return row is not None


def test_every_form_of_a_connection_string_is_understood(
    postgres: LocalPostgres, empty_database: str, tmp_path: Path
) -> None:
    password = "p@ss:/ 'w%rd\\"
    quoted = psycopg.conninfo.make_conninfo(postgres.dsn("labelstation_owner", empty_database), password=password)
    folder = str(postgres.socket_directory).replace("/", "%2F")
    name = quote(empty_database, safe="")
    env_file = write_settings(tmp_path / "migrate.env")
    for number, dsn in enumerate(
        (
            quoted,
            f"postgresql://labelstation_owner:p%40ss%3A%2F@{folder}:5432/{name}",
            f"postgres:///{name}?host={folder}&user=labelstation_owner&port=5432",
        )
    ):
        done = run_script("migrate", env_file=env_file, DATA_FACTORY_OWNER_DSN=dsn)
        assert done.returncode == 0, done.stderr
        assert ("nothing to do" in done.stdout) == (number > 0)
        assert "p@ss" not in done.stderr


def test_what_is_wrong_is_said(postgres: LocalPostgres, data_factory: str, tmp_path: Path) -> None:
    for dsn, code, told in (
        (postgres.dsn("labelstation_owner", "nowhere"), 78, 'database "nowhere" does not exist'),
        (postgres.dsn("nobody", "data_factory"), 78, 'role "nobody" does not exist'),
        ("host=127.0.0.1 port=1 dbname=x", 75, "is it running?"),
        ("no connection string", 78, "is not a PostgreSQL connection string"),
    ):
        said = migrate(settings(tmp_path, dsn), expect=code)
        assert "DATA_FACTORY_OWNER_DSN" in said
        assert told in said
        assert said.count("\n") == 1
    said = migrate(settings(tmp_path, postgres.dsn("labelstation", data_factory)), expect=78)
    assert "DATA_FACTORY_OWNER_DSN: this role may not make tables" in said
