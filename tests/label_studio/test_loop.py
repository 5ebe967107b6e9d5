"""Samples go into Label Studio and people's work comes back, on a real Label Studio."""

from conftest import Station
from support import add_sample, text_result

CORRECTED = text_result("corrected_transcript", "xin chào tất cả các bạn")


def current(station: Station, sample_id: str, kind: str = "transcript") -> tuple[str, str]:
    """Source and text of a sample's current revision."""
    row = station.db.execute(
        """
        SELECT source::text, coalesce(text, segments::text) FROM revisions
        WHERE sample_id = %s AND kind = %s AND withdrawn_at IS NULL ORDER BY version DESC LIMIT 1
        """,
        [sample_id, kind],
    ).fetchone()
    assert row is not None
    return row[0], row[1]


def state(station: Station, sample_id: str) -> str:
    """State of a sample's latest task."""
    row = station.db.execute(
        "SELECT state::text FROM tasks WHERE sample_id = %s ORDER BY reserved_at DESC LIMIT 1", [sample_id]
    ).fetchone()
    assert row is not None
    return str(row[0])


def push(station: Station, task_type: str = "transcript_correction") -> dict[str, int]:
    station.run("push", "--task-type", task_type)
    return station.tasks(task_type)


def pull(
    station: Station, task_type: str = "transcript_correction", *arguments: str, expect: int = 0
) -> dict[str, int]:
    result = station.run("pull", "--task-type", task_type, *arguments, expect=expect)
    counts: dict[str, int] = result[task_type]
    return counts


def test_a_corrected_transcript_becomes_the_samples_text(station: Station) -> None:
    sample_id = add_sample(station.db, "a")
    tasks = push(station)
    assert station.db.execute("SELECT lock_status FROM v_sync_status").fetchone() == ("locked",)
    station.admin.annotate(tasks[sample_id], CORRECTED)
    assert pull(station)["new"] == 1
    assert current(station, sample_id) == ("human", "xin chào tất cả các bạn")
    assert state(station, sample_id) == "done"
    assert station.db.execute("SELECT lock_status FROM v_sync_status").fetchone() == ("unlocked",)
    assert pull(station) == dict.fromkeys(pull(station), 0)


def test_pushing_again_makes_no_second_task(station: Station) -> None:
    add_sample(station.db, "a")
    tasks = push(station)
    again = station.run("push", "--task-type", "transcript_correction")
    assert again["pushed"] == 0
    assert again["left_out"] == {"open": 1}
    assert station.tasks() == tasks
