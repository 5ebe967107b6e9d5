"""Rows that become visible after newer ones were pulled are not missed."""

from datetime import timedelta

import psycopg
import pytest
from psycopg.types.json import Jsonb

from conftest import Station
from loop import CORRECTED, TRANSCRIPT, add_annotations, current, pull, push, said
from station.local_services import LocalPostgres
from support import add_sample


@pytest.mark.parametrize("lag", [timedelta(seconds=1), timedelta(hours=2)], ids=["plain", "after hours"])
def test_work_that_is_committed_late_is_not_missed(station: Station, postgres: LocalPostgres, lag: timedelta) -> None:
    inserted, changed, punctual = (add_sample(station.db, name) for name in ("inserted", "changed", "punctual"))
    tasks = push(station)
    annotation = station.admin.annotate(tasks[changed], said("lần một"))
    assert pull(station)["new"] == 1
    with psycopg.connect(postgres.dsn("label_studio", "label_studio")) as slow:
        add_annotations(slow, station.projects[TRANSCRIPT], [tasks[inserted]])
        # As Django does inside a request: a savepoint, which PostgreSQL numbers like a transaction of its own.
        with slow.transaction():
            slow.execute(
                "UPDATE task_completion SET result = jsonb_set(result, '{0,value,text,0}', %s) WHERE id = %s",
                [Jsonb("lần hai"), annotation],
            )
        slow.execute(
            "UPDATE task_completion SET updated_at = now() - %s WHERE task_id = ANY (%s)",
            [lag, [tasks[inserted], tasks[changed]]],
        )
        station.admin.annotate(tasks[punctual], CORRECTED)
        assert pull(station) == {"new": 1, "revisions": 1, "stderr": ""}
        slow.commit()
    assert pull(station) == {"new": 1, "changed": 1, "revisions": 2, "stderr": ""}
    assert current(station.db, inserted) == ("human", f"câu số {tasks[inserted]}")
    assert current(station.db, changed) == ("human", "lần hai")
    assert pull(station) == {"stderr": ""}


def test_a_transaction_that_stays_open_keeps_the_next_pulls_watching(station: Station, postgres: LocalPostgres) -> None:
    late = add_sample(station.db, "late")
    tasks = push(station)
    with psycopg.connect(postgres.dsn("label_studio", "label_studio")) as slow:
        add_annotations(slow, station.projects[TRANSCRIPT], [tasks[late]])
        slow.execute("UPDATE task_completion SET updated_at = now() - interval '2 hours'")
        for _ in range(3):
            assert pull(station) == {"stderr": ""}
        slow.commit()
    assert pull(station)["new"] == 1
