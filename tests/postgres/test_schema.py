"""The schema's own promises, on a real PostgreSQL."""

from concurrent.futures import ThreadPoolExecutor

import psycopg

from station.local_services import LocalPostgres
from support import Connection, add_sample


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
