"""Steps of the loop as tests take them: push, annotate, pull, and what the ledger then says."""

import json
from typing import Any

from conftest import Station
from station.local_services import PROJECT
from support import Connection, text_result

TRANSCRIPT = "transcript_correction"
CORRECTED = text_result("corrected_transcript", "xin chào tất cả các bạn")


def template_result(task_type: str) -> list[dict[str, Any]]:
    """The result that the labelling page of a task type sends."""
    file = PROJECT / "label_studio_templates" / f"{task_type}.annotation.json"
    result: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["result"]
    return result


def said(text: str) -> list[dict[str, Any]]:
    """The result of a transcript correction."""
    return text_result("corrected_transcript", text)


def push(station: Station, task_type: str = TRANSCRIPT) -> dict[str, int]:
    """Push; sample id → Label Studio's task id."""
    station.run("push", "--task-type", task_type)
    return station.tasks(task_type)


def pull(station: Station, *arguments: str, task_type: str = TRANSCRIPT, expect: int = 0) -> dict[str, Any]:
    """Pull; the counts, and what was said on stderr."""
    answer = station.run("pull", "--task-type", task_type, *arguments, expect=expect)
    return {name: number for name, number in answer[task_type].items() if number} | {"stderr": answer["stderr"]}


def current(db: Connection, sample_id: str, kind: str = "transcript") -> tuple[str, Any]:
    """Source and content of a sample's current revision."""
    row = db.execute(
        """
        SELECT source::text, coalesce(to_jsonb(text), segments) FROM revisions
        WHERE sample_id = %s AND kind = %s AND withdrawn_at IS NULL ORDER BY version DESC LIMIT 1
        """,
        [sample_id, kind],
    ).fetchone()
    assert row is not None
    return row[0], row[1]


def state(db: Connection, sample_id: str) -> tuple[str, bool]:
    """State of a sample's latest task, and whether the sample is locked."""
    row = db.execute(
        """
        SELECT t.state::text, s.locked_by IS NOT NULL FROM tasks AS t INNER JOIN samples AS s USING (sample_id)
        WHERE sample_id = %s ORDER BY reserved_at DESC LIMIT 1
        """,
        [sample_id],
    ).fetchone()
    assert row is not None
    return row[0], row[1]


def version(db: Connection, sample_id: str) -> int:
    """A sample's version; fails if the ledger says another."""
    row = db.execute(
        """
        SELECT s.sync_version, max(c.sync_version)
        FROM samples AS s INNER JOIN sample_changes AS c USING (sample_id)
        WHERE sample_id = %s GROUP BY s.sync_version
        """,
        [sample_id],
    ).fetchone()
    assert row is not None
    assert row[0] == row[1]
    return int(row[0])


def add_annotations(label_studio_db: Connection, project_id: int, task_ids: list[int]) -> None:
    """One finished transcript correction for each task, quickly: as rows in Label Studio's own tables."""
    label_studio_db.execute(
        """
        INSERT INTO task_completion (
            result, was_cancelled, ground_truth, created_at, updated_at, task_id, project_id, lead_time, result_count,
            completed_by_id
        )
        SELECT
            jsonb_build_array(jsonb_build_object(
                'from_name', 'corrected_transcript', 'to_name', 'audio', 'type', 'textarea',
                'value', jsonb_build_object('text', jsonb_build_array('câu số ' || task_id))
            )),
            false, false, now(), now(), task_id, %s, 1, 1, (SELECT min(id) FROM htx_user)
        FROM unnest(%s::int[]) AS task_id
        """,
        [project_id, task_ids],
    )
