"""The schema's own promises, on a real PostgreSQL."""

import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from station.local_services import PROJECT, LocalPostgres
from station.task_types import TASK_TYPES
from support import Connection, add_sample, change_text


def test_sixteen_concurrent_writers_make_sixteen_revisions(
    postgres: LocalPostgres, data_factory: str, db: Connection
) -> None:
    sample_id = add_sample(db, "a", None, None)

    def write(number: int) -> None:
        with psycopg.connect(postgres.dsn("labelstation", data_factory)) as connection:
            connection.execute(
                "INSERT INTO transcript_revisions (sample_id, text, source) VALUES (%s, %s, 'human')",
                [sample_id, f"writer {number}"],
            )

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, range(16)))
    versions = db.execute("SELECT version FROM transcript_revisions ORDER BY version").fetchall()
    assert versions == [(number,) for number in range(1, 17)]
    ledger = db.execute("SELECT sync_version, kind::text FROM sample_changes ORDER BY sync_version").fetchall()
    assert ledger == [(number, "transcript") for number in range(2, 18)]
    assert db.execute("SELECT sync_version FROM samples").fetchone() == (17,)


def test_task_types_have_one_vocabulary(db: Connection) -> None:
    known = db.execute("SELECT unnest(enum_range(NULL::task_type))::text").fetchall()
    assert [name for (name,) in known] == list(TASK_TYPES)
    kinds = db.execute("SELECT unnest(enum_range(NULL::revision_kind))::text").fetchall()
    assert {task_type.revision_kind for task_type in TASK_TYPES.values()} == {kind for (kind,) in kinds}
    for task_type in TASK_TYPES.values():
        template = ET.parse(PROJECT / "label_studio_templates" / task_type.template)
        names = {element.get("name") for element in template.iter() if "toName" in element.attrib}
        assert task_type.control in names
        shown = {element.get("value", "") for element in template.iter()}
        assert {value[1:] for value in shown if value.startswith("$")} == set(task_type.data_fields)


def test_the_scripts_role_can_rewrite_neither_history_nor_schema(db: Connection) -> None:
    sample_id = add_sample(db, "a")
    db.execute("INSERT INTO tasks (sample_id, task_type, project_id) VALUES (%s, 'translation_review', 1)", [sample_id])
    for statement in (
        "UPDATE sample_changes SET source = 'human'",
        "DELETE FROM sample_changes",
        "DELETE FROM samples",
        "DELETE FROM revisions",
        "DELETE FROM submitted_annotations",
        "UPDATE task_showings SET sync_version = 1",
        "DELETE FROM tasks",
        "TRUNCATE runs",
        "ALTER TABLE samples ADD COLUMN mine text",
        "CREATE TABLE mine ()",
        "DROP VIEW annotations",
        "CREATE OR REPLACE FUNCTION relevant_changes(p_task_type task_type) RETURNS change_kind[] LANGUAGE sql "
        "RETURN NULL::change_kind[]",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            db.execute(statement.encode())


def test_a_sample_has_one_open_task_of_a_type(db: Connection) -> None:
    sample_id = add_sample(db, "a")
    insert = "INSERT INTO tasks (sample_id, task_type, project_id) VALUES (%s, 'transcript_correction', 1)"
    db.execute(insert, [sample_id])
    with pytest.raises(psycopg.errors.UniqueViolation):
        db.execute(insert, [sample_id])
    db.execute("UPDATE tasks SET state = 'failed'")
    db.execute(insert, [sample_id])


def test_the_thousandth_annotator_has_a_pseudonym_too(db: Connection) -> None:
    db.execute(
        "INSERT INTO annotators (annotator_id, label_studio_user_id) SELECT n, n FROM generate_series(1, 1001) AS n"
    )
    names = db.execute("SELECT pseudonym FROM annotators WHERE annotator_id IN (7, 100, 1000) ORDER BY 1").fetchall()
    assert names == [("annotator-007",), ("annotator-100",), ("annotator-1000",)]


def test_times_survive_a_dump_and_restore(
    postgres: LocalPostgres, data_factory: str, db: Connection, tmp_path: Path
) -> None:
    sample_id = add_sample(db, "a")
    db.execute("UPDATE samples SET created_at = '2020-01-01Z', updated_at = '2020-02-02Z'")
    db.execute("UPDATE revisions SET created_at = '2020-03-03Z'")
    tables = ("samples", "revisions", "sample_changes", "runs", "tasks")
    before = {table: content(db, table) for table in tables}
    restored = sql.Identifier(f"{data_factory}_restored")
    postgres.dump(data_factory, tmp_path / "dump")
    with psycopg.connect(postgres.dsn("postgres", "postgres"), autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(restored))
        try:
            postgres.restore(f"{data_factory}_restored", tmp_path / "dump")
            with psycopg.connect(postgres.dsn("postgres", f"{data_factory}_restored"), autocommit=True) as other:
                assert {table: content(other, table) for table in tables} == before
                # And it goes on where it was.
                change_text(other, sample_id, "transcript", "tiếp")
                assert other.execute("SELECT max(version) FROM transcript_revisions").fetchone() == (2,)
        finally:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(restored))


def content(db: Connection, table: str) -> list[tuple[str]]:
    return db.execute(sql.SQL("SELECT t::text FROM {} AS t ORDER BY 1").format(sql.Identifier(table))).fetchall()
