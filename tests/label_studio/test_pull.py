"""People's work comes home from a real Label Studio: what they said, what they skipped, what they took back."""

import unicodedata
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from conftest import Station
from loop import CORRECTED, TRANSCRIPT, add_annotations, current, pull, push, said, state, template_result, version
from station.local_annotator import Annotator
from support import Connection, add_sample, change_audio, change_text

BEFORE = "xin chào các bạn"


@pytest.fixture
def colleague(station: Station, request: pytest.FixtureRequest) -> Annotator:
    """A second person."""
    name = f"colleague-{abs(hash(request.node.nodeid))}"
    return station.admin.invite(f"{name}@labelstation.example", "correct horse")


def test_each_task_type_comes_home_as_its_labelling_page_sends_it(station: Station) -> None:
    samples = {}
    for task_type in station.projects:
        samples[task_type] = add_sample(station.db, task_type)
        tasks = push(station, task_type)
        assert list(tasks) == [samples[task_type]]
        # The note comes first in one of them: it is text, too, but not the transcript.
        station.admin.annotate(tasks[samples[task_type]], list(reversed(template_result(task_type))))
    counts = station.run("pull")
    assert [counts[task_type]["revisions"] for task_type in station.projects] == [1, 1, 1]
    assert current(station.db, samples[TRANSCRIPT]) == (
        "human",
        "Hôm qua team mình deploy lên production lúc nửa đêm, sáng ra mới thấy bị memory leak.",
    )
    assert current(station.db, samples[TRANSCRIPT], "translation") == ("crawler", "hello everyone")
    assert current(station.db, samples["translation_review"], "translation") == (
        "human",
        "Yesterday our team deployed to production at midnight and only noticed the memory leak in the morning.",
    )
    assert current(station.db, samples["translation_review"]) == ("crawler", BEFORE)
    source, segments = current(station.db, samples["audio_segmentation"], "segmentation")
    assert source == "human"
    assert [segment["label"] for segment in segments] == ["Vietnamese", "English"] * 4
    assert [segment["start"] for segment in segments] == sorted(segment["start"] for segment in segments)
    assert [segment["tags"] for segment in segments if segment["tags"]] == [["uncertain_boundary"]]
    assert segments[0]["end"] == pytest.approx(0.694209, abs=1e-6)
    for sample_id in samples.values():
        assert state(station.db, sample_id) == ("done", False)
        assert version(station.db, sample_id) == 4
    heard = station.db.execute(
        """
        SELECT bool_and(r.audio_file_md5 = s.audio_file_md5 AND r.created_by = 'annotator-001')
        FROM revisions AS r INNER JOIN samples AS s USING (sample_id) WHERE r.source = 'human'
        """
    ).fetchone()
    assert heard == (True,)


def test_text_arrives_as_it_was_entered(station: Station) -> None:
    texts = {
        "decomposed": unicodedata.normalize("NFD", "Hôm qua trời nắng đẹp"),
        "quotes": """She said: "it's \\n fine" -- '); DROP TABLE samples; {} %s $1""",
        "lines": "một\nhai\r\n\tba",
        "emoji": "tốt 👍🏽 𝄞 \u200d",
        "markup": "<script>alert('a')</script> & <b>đậm</b>",
        "long": "một hai ba " * 10_000,
    }
    samples = {name: add_sample(station.db, name) for name in texts}
    tasks = push(station)
    for name, sample_id in samples.items():
        station.admin.annotate(tasks[sample_id], said(texts[name]))
    assert pull(station)["revisions"] == len(texts)
    for name, sample_id in samples.items():
        assert current(station.db, sample_id) == ("human", unicodedata.normalize("NFC", texts[name])), name


def test_work_that_cannot_be_used_is_named_and_the_rest_goes_on(station: Station) -> None:
    def region(start: Any, end: Any, labels: list[str]) -> list[dict[str, Any]]:
        value = {"start": start, "end": end, "labels": labels}
        return [{"id": "r", "from_name": "segment_labels", "to_name": "audio", "type": "labels", "value": value}]

    note = [{**said("một ghi chú")[0], "from_name": "notes"}]
    unusable = {
        TRANSCRIPT: {"note only": note, "empty": said(""), "blank": said(" \n\t"), "nothing": []},
        "audio_segmentation": {
            "no label": region(0, 1, []),
            "backwards": region(2, 1, ["English"]),
            "no length": region(1, 1, ["English"]),
            "no number": region("0", 1, ["English"]),
            "no region": note,
        },
    }
    ids: dict[str, int] = {}
    for task_type, cases in unusable.items():
        samples = {name: add_sample(station.db, f"{task_type} {name}") for name in [*cases, "good"]}
        tasks = push(station, task_type)
        for name, result in {**cases, "good": template_result(task_type)}.items():
            ids[name] = station.admin.annotate(tasks[samples[name]], result)
    # What no labelling page sends, but the database allows.
    station.label_studio_db.execute("UPDATE task_completion SET result = NULL WHERE id = %s", [ids["nothing"]])
    station.label_studio_db.execute("UPDATE task_completion SET lead_time = 1e300 WHERE id = %s", [ids["good"]])
    answer = station.run("pull", expect=3)
    for task_type, cases in unusable.items():
        assert answer[task_type]["invalid"] == len(cases)
        assert answer[task_type]["revisions"] == 1
        for name in cases:
            assert f"annotation {ids[name]} of sample" in answer["stderr"], name
    assert station.db.execute(
        "SELECT count(*) FROM annotations WHERE status = 'invalid' AND problem <> '' AND text IS NULL"
    ).fetchone() == (9,)
    assert station.db.execute("SELECT count(*) FROM tasks WHERE state = 'open'").fetchone() == (9,)
    assert station.db.execute("SELECT count(*) FROM samples WHERE locked_by IS NOT NULL").fetchone() == (9,)
    station.admin.change(ids["empty"], CORRECTED)
    assert pull(station) == {"changed": 1, "revisions": 1, "stderr": ""}


def test_a_skip_is_no_correction(station: Station, colleague: Annotator) -> None:
    skipped, taken_over, regretted = (add_sample(station.db, name) for name in ("skipped", "taken over", "regretted"))
    tasks = push(station)
    for sample_id in (skipped, taken_over):
        station.admin.annotate(tasks[sample_id], [], skip=True)
    finished = station.admin.annotate(tasks[regretted], CORRECTED)
    change_text(station.db, skipped, "transcript", "máy nghe lại")  # a skip is never a conflict
    assert pull(station) == {"new": 3, "skipped": 2, "revisions": 1, "stderr": ""}
    assert state(station.db, skipped) == ("skipped", True)
    assert current(station.db, skipped) == ("crawler", "máy nghe lại")
    assert state(station.db, regretted) == ("done", False)
    assert push(station) == tasks

    colleague.annotate(tasks[taken_over], CORRECTED)
    station.admin.call("PATCH", f"/api/annotations/{finished}/", {"was_cancelled": True, "result": []})
    assert pull(station) == {"new": 1, "changed": 1, "skipped": 1, "revisions": 1, "stderr": ""}
    assert state(station.db, taken_over) == ("done", False)
    assert current(station.db, taken_over) == ("human", "xin chào tất cả các bạn")
    assert state(station.db, regretted) == ("skipped", True)
    assert current(station.db, regretted) == ("crawler", BEFORE)
    assert version(station.db, regretted) == 5


def test_what_is_deleted_is_withdrawn(station: Station) -> None:
    annotated, deleted, untouched = (add_sample(station.db, name) for name in "abc")
    tasks = push(station)
    annotation = station.admin.annotate(tasks[annotated], CORRECTED)
    station.admin.annotate(tasks[deleted], CORRECTED)
    pull(station)
    station.admin.delete_annotation(annotation)
    station.admin.delete_task(tasks[deleted])
    station.admin.delete_task(tasks[untouched])
    assert pull(station) == {"withdrawn": 2, "deleted_tasks": 2, "stderr": ""}
    for sample_id in (annotated, deleted):
        assert current(station.db, sample_id) == ("crawler", BEFORE)
        assert version(station.db, sample_id) == 5
    assert version(station.db, untouched) == 3
    assert state(station.db, annotated) == ("open", True)
    assert state(station.db, deleted) == state(station.db, untouched) == ("deleted", False)
    assert pull(station) == {"stderr": ""}
    # The work can be done again: on the open task, and on new tasks of the samples that wait again.
    again = push(station)
    assert set(again) == set(tasks)
    assert again[annotated] == tasks[annotated]
    assert {again[deleted], again[untouched]}.isdisjoint(tasks.values())
    station.admin.annotate(again[annotated], said("lần hai"))
    assert pull(station)["revisions"] == 1
    assert current(station.db, annotated) == ("human", "lần hai")


def test_work_sent_in_again_supersedes_and_a_mark_does_not(station: Station) -> None:
    sample_id = add_sample(station.db, "a")
    annotation = station.admin.annotate(push(station)[sample_id], said("lần một"))
    pull(station)
    station.admin.change(annotation, said("lần hai"))
    assert pull(station) == {"changed": 1, "revisions": 1, "stderr": ""}
    assert current(station.db, sample_id) == ("human", "lần hai")
    # One change of the sample's text, one version.
    assert version(station.db, sample_id) == 5
    withdrawn = station.db.execute("SELECT text FROM revisions WHERE withdrawn_at IS NOT NULL").fetchall()
    assert withdrawn == [("lần một",)]

    # Somebody resolved a conflict on it; then it is only starred. What was decided stays.
    station.db.execute(
        "UPDATE submitted_annotations SET conflict_detected = true, conflict_kinds = '{audio}', "
        "conflict_resolution = 'human_wins', resolved_at = now(), resolved_by = 'lan'"
    )
    change_audio(station.db, sample_id)
    station.admin.call("PATCH", f"/api/annotations/{annotation}/", {"ground_truth": True})
    assert pull(station) == {"stderr": ""}
    assert station.db.execute("SELECT conflict_resolution::text, resolved_by FROM annotations").fetchone() == (
        "human_wins",
        "lan",
    )
    assert current(station.db, sample_id) == ("human", "lần hai")
    assert state(station.db, sample_id) == ("done", False)


def test_two_people_on_one_task_are_two_annotators(station: Station, colleague: Annotator) -> None:
    sample_id = add_sample(station.db, "a")
    task_id = push(station)[sample_id]
    station.db.execute("UPDATE tasks SET planned_overlap = 2")
    first = station.admin.annotate(task_id, said("người một"))
    # A pull that is taken back uses up no pseudonym.
    pull(station, "--dry-run")
    pull(station)
    assert state(station.db, sample_id) == ("open", True)
    colleague.annotate(task_id, said("người hai"))
    # The first person's work is no change that came from outside.
    assert pull(station) == {"new": 1, "revisions": 1, "stderr": ""}
    assert state(station.db, sample_id) == ("done", False)
    people = station.db.execute("SELECT annotator, text FROM annotations ORDER BY submitted_at").fetchall()
    assert people == [("annotator-001", "người một"), ("annotator-002", "người hai")]
    assert version(station.db, sample_id) == 5
    # An older text that is withdrawn was not the sample's text any more.
    station.admin.delete_annotation(first)
    assert pull(station) == {"withdrawn": 1, "stderr": ""}
    assert version(station.db, sample_id) == 5
    assert current(station.db, sample_id) == ("human", "người hai")
    assert state(station.db, sample_id) == ("open", True)


def test_tasks_are_recognised_by_their_key_and_others_left_alone(station: Station) -> None:
    lost, edited = add_sample(station.db, "lost"), add_sample(station.db, "edited")
    tasks = push(station)
    project = station.projects[TRANSCRIPT]
    others = station.admin.call(
        "POST",
        f"/api/projects/{project}/import?return_task_ids=true",
        [
            {"data": {"audio": "/a.wav", "text": "của ai", "sample_id": "x"}, "meta": meta}
            for meta in ({}, {"labelstation_key": "not a key"}, {"labelstation_key": lost})
        ],
    )["task_ids"]
    # A push was killed after Label Studio had made the task and before its id was recorded.
    station.db.execute("UPDATE tasks SET state = 'reserved', label_studio_task_id = NULL WHERE sample_id = %s", [lost])
    station.label_studio_db.execute("UPDATE task SET meta = '{}' WHERE id = %s", [tasks[edited]])
    for task_id in [*tasks.values(), *others]:
        station.admin.annotate(task_id, CORRECTED)
    assert pull(station) == {"new": 2, "revisions": 2, "foreign": 3, "stderr": ""}
    assert state(station.db, lost) == state(station.db, edited) == ("done", False)
    recorded = station.db.execute("SELECT label_studio_task_id FROM tasks WHERE sample_id = %s", [lost]).fetchone()
    assert recorded == (tasks[lost],)


def refresh(db: Connection, sample_id: str) -> None:
    """The untouched task shows the sample's new version from now on."""
    db.execute(
        """
        INSERT INTO task_showings (task_key, sync_version, audio_file_md5)
        SELECT t.task_key, s.sync_version, s.audio_file_md5
        FROM tasks AS t INNER JOIN samples AS s USING (sample_id) WHERE t.sample_id = %s
        """,
        [sample_id],
    )


def change(db: Connection, sample_id: str, kind: str) -> None:
    """The crawler changes a sample."""
    if kind == "audio":
        change_audio(db, sample_id)
    elif kind == "removal":
        db.execute(
            """
            WITH removed AS (
                UPDATE samples SET removed_at = now(), sync_version = sync_version + 1 WHERE sample_id = %s
                RETURNING sample_id, sync_version
            )
            INSERT INTO sample_changes (sample_id, sync_version, kind, source)
            SELECT sample_id, sync_version, 'removal', 'crawler' FROM removed
            """,
            [sample_id],
        )
    else:
        change_text(db, sample_id, kind, "máy nghe lại")


@pytest.mark.parametrize("task_type", [TRANSCRIPT, "translation_review"])
def test_a_conflict_is_judged_by_what_the_person_saw(station: Station, task_type: str) -> None:
    kinds = ("audio", "transcript", "translation", "removal")
    relevant = kinds if task_type == "translation_review" else ("audio", "transcript", "removal")
    # Moment of the change → whether the person saw the sample as it is when the work is pulled.
    moments = {
        "before it was opened, and the task was refreshed": True,
        "before it was opened, and the task was not refreshed": False,
        "while it was open, and the task was refreshed under the person's hands": False,
        "after it was submitted": False,
    }
    samples = {(moment, kind): add_sample(station.db, f"{moment} {kind}") for moment in moments for kind in kinds}
    tasks = push(station, task_type)
    for (moment, kind), sample_id in samples.items():
        if "submitted" not in moment:
            change(station.db, sample_id, kind)
        if "was refreshed" in moment:
            refresh(station.db, sample_id)
        seconds = 3600 if "while" in moment else 0.0001
        station.admin.annotate(tasks[sample_id], template_result(task_type), lead_time=seconds)
        if "submitted" in moment:
            change(station.db, sample_id, kind)
    expected = {
        sample_id: f"{{{kind}}}"
        for (moment, kind), sample_id in samples.items()
        if kind in relevant and not moments[moment]
    }
    counts = pull(station, task_type=task_type, expect=4)
    assert counts["conflicts"] == len(expected)
    rows = station.db.execute("SELECT * FROM annotations WHERE conflict_detected = TRUE")
    columns = [column.name for column in rows.description or ()]
    found = [dict(zip(columns, row, strict=True)) for row in rows]
    assert {str(row["sample_id"]): row["conflict_kinds"] for row in found} == expected
    assert all(row["shown_version"] < row["current_version"] and row["text"] for row in found)
    written = station.db.execute("SELECT sample_id::text FROM revisions WHERE source = 'human'").fetchall()
    assert {sample_id for (sample_id,) in written} == set(samples.values()) - set(expected)
    assert {state(station.db, sample_id) for sample_id in expected} == {("conflict", False)}
    # Nothing new: the conflict is still there, but the pull itself is done.
    assert pull(station, task_type=task_type) == {"stderr": ""}


def test_a_text_that_falls_back_under_somebodys_hands_is_a_conflict(station: Station) -> None:
    sample_id = add_sample(station.db, "a")
    first = station.admin.annotate(push(station)[sample_id], CORRECTED)
    pull(station)
    change_audio(station.db, sample_id)
    second_task = push_again(station, sample_id)
    station.admin.delete_annotation(first)
    pull(station)
    assert current(station.db, sample_id) == ("crawler", BEFORE)
    station.admin.annotate(second_task, said("lần hai"))
    assert pull(station, expect=4)["conflicts"] == 1


def push_again(station: Station, sample_id: str) -> int:
    """Push a sample whose first task does not count any more; the new task's id."""
    station.run("push", "--task-type", TRANSCRIPT)
    row = station.db.execute(
        "SELECT label_studio_task_id FROM tasks WHERE sample_id = %s AND state = 'open'", [sample_id]
    ).fetchone()
    assert row is not None
    return int(row[0])


LEDGER = ("samples", "revisions", "sample_changes", "tasks", "submitted_annotations", "annotators", "task_showings")


def ledger(db: Connection) -> dict[str, list[Any]]:
    """Everything that a pull could change; a row that was only written again differs, too."""
    return {
        table: db.execute(f"SELECT xmin::text, ctid::text, t::text FROM {table} AS t ORDER BY 2").fetchall()
        for table in LEDGER
    }


def test_pulling_again_changes_nothing(station: Station) -> None:
    samples = [add_sample(station.db, f"{number}") for number in range(6)]
    tasks = push(station)
    station.admin.annotate(tasks[samples[0]], CORRECTED)
    station.admin.annotate(tasks[samples[1]], [], skip=True)
    station.admin.annotate(tasks[samples[2]], [])
    change_audio(station.db, samples[3])
    station.admin.annotate(tasks[samples[3]], CORRECTED)
    station.admin.call("POST", f"/api/tasks/{tasks[samples[4]]}/drafts", {"result": CORRECTED, "lead_time": 5})
    before = ledger(station.db)
    foretold = pull(station, "--dry-run")
    assert ledger(station.db) == before
    assert station.db.execute("SELECT count(*) FROM runs WHERE script = 'pull'").fetchone() == (0,)
    assert pull(station, expect=4) == foretold
    assert foretold["new"] == 4
    # The seed document's query.
    pending = station.db.execute(
        """
        SELECT s.sample_id::text, a.status::text, a.task_type::text
        FROM samples s JOIN annotations a ON s.sample_id = a.sample_id
        WHERE a.status IN ('pending', 'in_progress')
        """
    ).fetchall()
    assert sorted(pending) == sorted([(samples[4], "in_progress", TRANSCRIPT), (samples[5], "pending", TRANSCRIPT)])
    after = ledger(station.db)
    for arguments in ([], ["--full"], ["--since", "2020-01-01"]):
        assert pull(station, *arguments) == {"stderr": ""}
        assert ledger(station.db) == after, arguments


def test_what_is_left_by_one_pull_the_next_one_takes(station: Station) -> None:
    samples = [add_sample(station.db, f"{number}") for number in range(5)]
    tasks = push(station)
    add_annotations(station.label_studio_db, station.projects[TRANSCRIPT], list(tasks.values()))
    told = [pull(station, "--limit", "2") for _ in range(3)]
    assert [(counts["new"], counts.get("left_for_next", 0)) for counts in told] == [(2, 3), (2, 1), (1, 0)]
    assert {state(station.db, sample_id) for sample_id in samples} == {("done", False)}
    # Work whose time lies before what was read already: only an explicit --since or --full looks there.
    late = add_sample(station.db, "late")
    tasks = push(station)
    add_annotations(station.label_studio_db, station.projects[TRANSCRIPT], [tasks[late]])
    station.label_studio_db.execute(
        "UPDATE task_completion SET updated_at = updated_at - interval '3 days' WHERE task_id = %s", [tasks[late]]
    )
    day = datetime.now(UTC) - timedelta(days=1)
    assert pull(station) == {"stderr": ""}
    assert pull(station, "--since", day.isoformat()) == {"stderr": ""}
    assert pull(station, "--since", (day - timedelta(days=3)).isoformat())["new"] == 1


def test_many_deletions_at_once_need_a_persons_word(station: Station) -> None:
    for number in range(120):
        add_sample(station.db, f"{number}", translation=None)
    tasks = push(station)
    add_annotations(station.label_studio_db, station.projects[TRANSCRIPT], list(tasks.values()))
    assert pull(station)["revisions"] == 120
    before = ledger(station.db)
    station.label_studio_db.execute("DELETE FROM task_completion WHERE project_id = %s", [station.projects[TRANSCRIPT]])
    for _ in range(2):
        told = pull(station, expect=4)
        assert "withdrawn" not in told
        assert "--accept-deletions" in told["stderr"]
    assert ledger(station.db) == before
    assert pull(station, "--accept-deletions")["withdrawn"] == 120
    assert station.db.execute(
        "SELECT count(*) FILTER (WHERE state = 'open'), count(*) FILTER (WHERE state <> 'open') FROM tasks"
    ).fetchone() == (120, 0)
    assert pull(station) == {"stderr": ""}
