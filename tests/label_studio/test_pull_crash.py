"""A pull that is killed, or fails halfway, leaves nothing half done; the next one ends in the same state."""

import os
import subprocess
import sys
from pathlib import Path

import psycopg
from psycopg import sql

from conftest import Station
from loop import TRANSCRIPT, add_annotations, pull, push
from station.local_services import PROJECT, LocalPostgres
from support import Connection, RandomKills, add_sample, eventually

KILLS = 25
SAMPLES = 250


def start_pull(station: Station, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable, str(PROJECT / "scripts" / "pull.py"), "--env-file", str(station.env_file),
            "--task-type", TRANSCRIPT, *arguments,
        ],
        env={"PATH": os.environ["PATH"]},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def prepared(station: Station) -> dict[str, int]:
    """Samples with a finished annotation each, not yet pulled."""
    for number in range(SAMPLES):
        add_sample(station.db, f"{number}", translation=None)
    tasks = push(station)
    add_annotations(station.label_studio_db, station.projects[TRANSCRIPT], list(tasks.values()))
    return tasks


def outcome(db: Connection) -> list[tuple[object, ...]]:
    """What a pull leaves for each sample, but for ids and times."""
    return db.execute(
        """
        SELECT
            s.sample_id::text, s.sync_version, s.locked_by, t.state::text, a.status::text, a.text, w.pseudonym,
            a.shown_version, a.current_version, a.conflict_kinds::text, r.version, r.sync_version, r.text,
            r.withdrawn_at, c.sync_version, c.kind::text, c.source::text, c.content_hash
        FROM samples AS s
        LEFT JOIN tasks AS t USING (sample_id)
        LEFT JOIN submitted_annotations AS a USING (task_key)
        LEFT JOIN annotators AS w USING (annotator_id)
        LEFT JOIN revisions AS r ON r.sample_id = s.sample_id
        LEFT JOIN sample_changes AS c ON c.sample_id = s.sample_id
        ORDER BY s.external_id, r.version, c.sync_version
        """
    ).fetchall()


def test_a_pull_killed_at_any_instant_and_run_again_is_as_if_it_had_not_been(
    station: Station, postgres: LocalPostgres, tmp_path: Path
) -> None:
    prepared(station)
    # What an uninterrupted pull makes of it, in a copy of the ledger.
    copy = f"{station.db.info.dbname}_copy"
    dump = tmp_path / "ledger.dump"
    postgres.dump(station.db.info.dbname, dump)
    with psycopg.connect(postgres.dsn("postgres", "postgres"), autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(copy)))
        try:
            postgres.restore(copy, dump)
            station.run("pull", DATA_FACTORY_DSN=postgres.dsn("postgres", copy))
            with psycopg.connect(postgres.dsn("postgres", copy)) as other:
                uninterrupted = outcome(other)
        finally:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(copy)))
    assert len(uninterrupted) == SAMPLES * 2 * 2

    kills = RandomKills(station.db, seed=7, longest=0.2)
    while kills.number < KILLS:
        with start_pull(station, "--limit", "9") as process:
            kills.strike(process)
        assert_whole(station.db)
    pull(station)
    assert outcome(station.db) == uninterrupted
    assert pull(station) == {"stderr": ""}


def assert_whole(db: Connection) -> None:
    """Each annotation in the ledger has all that it causes, and nothing is there without its annotation."""
    row = db.execute(
        """
        SELECT
            (SELECT count(*) FROM submitted_annotations),
            (SELECT count(*) FROM revisions WHERE source = 'human'),
            (SELECT count(*) FROM sample_changes WHERE source = 'human'),
            (SELECT count(*) FROM tasks WHERE state = 'done'),
            (SELECT count(*) FROM samples WHERE locked_by IS NULL AND sync_version = 3)
        """
    ).fetchone()
    assert row is not None
    assert len(set(row)) == 1, row


def test_a_statement_that_fails_midway_leaves_nothing_half_done(station: Station, postgres: LocalPostgres) -> None:
    prepared(station)
    with psycopg.connect(postgres.dsn("labelstation", station.db.info.dbname)) as blocker:
        # The pull has recorded annotations and revisions when it comes to this task.
        blocker.execute("SELECT FROM tasks LIMIT 1 FOR UPDATE")
        with start_pull(station) as process:
            eventually(lambda: blocked(station.db) is not None, "the pull's wait for the lock")
            station_pid = blocked(station.db)
            with psycopg.connect(postgres.dsn("postgres", "postgres")) as admin:
                admin.execute("SELECT pg_terminate_backend(%s)", [station_pid])
            assert process.wait(timeout=60) == 75
            assert process.stderr is not None
            told = process.stderr.read()
    assert "PostgreSQL broke off" in told
    assert told.count("\n") == 1
    assert station.db.execute("SELECT count(*) FROM submitted_annotations").fetchone() == (0,)
    assert_whole(station.db)
    # Two at once: one does the work, the other waits or leaves with 75.
    with start_pull(station) as first, start_pull(station) as second:
        codes = {first.wait(timeout=120), second.wait(timeout=120)}
    assert codes <= {0, 75}
    assert 0 in codes
    assert station.db.execute("SELECT count(*) FROM submitted_annotations").fetchone() == (SAMPLES,)
    assert_whole(station.db)


def blocked(db: Connection) -> int | None:
    """The pull's backend that waits for a lock."""
    row = db.execute(
        """
        SELECT pid FROM pg_stat_activity
        WHERE application_name = 'labelstation-pull' AND datname = current_database() AND wait_event_type = 'Lock'
        """
    ).fetchone()
    return int(row[0]) if row else None
