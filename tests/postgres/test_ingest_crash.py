"""An ingest that is killed and run again ends as one that was not; so do two at once."""

from pathlib import Path
from typing import Any

import psycopg
import pytest

from conftest import copied_database
from corpus import SmallCorpus
from station.local_services import LocalPostgres
from support import Connection, RandomKills, run_script, start_script, write_settings

BATCH_OF_INGEST = 10_000
LINES = 2 * BATCH_OF_INGEST + 1_000


def state(db: Connection) -> list[list[tuple[Any, ...]]]:
    """Everything that an ingest writes, without what differs from run to run by its nature."""
    queries = (
        """
        SELECT external_id, sync_version, title, audio_file_md5, transcript_md5, delivery_md5,
            removed_at IS NOT NULL, row_number() OVER (ORDER BY arrival)
        FROM samples ORDER BY external_id
        """,
        """
        SELECT external_id, c.sync_version, kind, content_hash
        FROM sample_changes AS c INNER JOIN samples USING (sample_id) ORDER BY 1, 2, 3
        """,
        """
        SELECT external_id, kind, version, r.sync_version, text
        FROM revisions AS r INNER JOIN samples USING (sample_id) ORDER BY 1, 2, 3
        """,
    )
    return [db.execute(query).fetchall() for query in queries]


@pytest.fixture(scope="module")
def deliveries(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two deliveries of a corpus of several batches; the second changes, drops and adds samples."""
    folder = tmp_path_factory.mktemp("deliveries")
    result = []
    for name, dropped in (("first", 0), ("second", 300)):
        corpus = SmallCorpus(folder / name)
        corpus.add("shared", transcript=f"{name} transcript")
        shared = corpus.lines.pop("shared")
        for number in range(dropped, LINES + dropped):
            corpus.lines[f"n{number:05d}"] = shared | {"id": f"n{number:05d}", "title": f"title {number}"}
        corpus.write()
        result.append(corpus.folder)
    return result


@pytest.fixture(scope="module")
def undisturbed(
    deliveries: list[Path], postgres: LocalPostgres, schema_template: str, tmp_path_factory: pytest.TempPathFactory
) -> list[list[list[tuple[Any, ...]]]]:
    """The state after each delivery when nothing goes wrong."""
    result = []
    with copied_database(postgres, schema_template, "ingest_undisturbed") as name:
        env_file = write_settings(
            tmp_path_factory.mktemp("undisturbed") / "settings",
            DATA_FACTORY_DSN=postgres.dsn("labelstation", name),
        )
        with psycopg.connect(postgres.dsn("labelstation", name), autocommit=True) as db:
            for delivery in deliveries:
                done = run_script("ingest", "--remove-missing", str(delivery), env_file=env_file)
                assert done.returncode == 0, done.stderr
                result.append(state(db))
    return result


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_instant_and_run_again_ends_the_same(
    deliveries: list[Path],
    undisturbed: list[list[list[tuple[Any, ...]]]],
    settings_file: Path,
    db: Connection,
    seed: int,
) -> None:
    kills = RandomKills(db, seed, longest=2.0)
    left_undone = 0
    for delivery, expected in zip(deliveries, undisturbed, strict=True):
        for _ in range(4):
            with start_script("ingest", "--remove-missing", str(delivery), env_file=settings_file) as running:
                kills.strike(running)
            left_undone += state(db) != expected
        done = run_script("ingest", "--remove-missing", str(delivery), env_file=settings_file)
        assert done.returncode == 0, done.stderr
        assert state(db) == expected
    assert left_undone > 0, "no kill came before the end"


def test_two_at_once_end_as_one(
    deliveries: list[Path], undisturbed: list[list[list[tuple[Any, ...]]]], settings_file: Path, db: Connection
) -> None:
    arguments = ("ingest", "--remove-missing", str(deliveries[0]))
    with (
        start_script(*arguments, env_file=settings_file) as one,
        start_script(*arguments, env_file=settings_file) as two,
    ):
        codes = sorted([one.wait(120), two.wait(120)])
        assert codes in ([0, 0], [0, 75])
    assert state(db) == undisturbed[0]


def test_a_lock_that_stays_held_ends_with_try_again(
    deliveries: list[Path], settings_file: Path, db: Connection
) -> None:
    db.execute("SELECT pg_advisory_lock(hashtextextended('labelstation ingest', 0))")
    done = run_script("ingest", str(deliveries[0]), env_file=settings_file)
    assert (done.returncode, done.stderr) == (75, "error: another ingest is running: wait until it has ended\n")
    assert db.execute("SELECT count(*) FROM samples").fetchone() == (0,)
