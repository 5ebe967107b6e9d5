"""Every SQL statement of the seed document runs, and its answer is true."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from station.local_services import LocalPostgres
from support import Connection, add_sample, change_audio, change_text

NOBODY = str(uuid4())
LOCK = "SELECT * FROM lock_sample_for_annotation(%s, %s)"
UNLOCK = "SELECT unlock_sample(%s, %s, %s)"
CHECK = "SELECT has_conflict, changes::text[], message FROM check_annotation_conflict(%s, %s)"
CHECK_FOR = "SELECT has_conflict, changes::text[] FROM check_annotation_conflict(%s, %s, %s)"


def add_task(db: Connection, sample_id: str, task_type: str = "transcript_correction", state: str = "open") -> str:
    """A task as push leaves it; returns its key."""
    row = db.execute(
        """
        INSERT INTO tasks (sample_id, task_type, project_id, label_studio_task_id, state)
        SELECT %s, %s, 1, 1 + count(*), %s FROM tasks RETURNING task_key::text
        """,
        [sample_id, task_type, state],
    ).fetchone()
    assert row is not None
    return str(row[0])


def add_annotation(db: Connection, task_key: str, user: int = 1, status: str = "completed", text: str = "x") -> str:
    """An annotation as pull leaves it; returns its id."""
    db.execute(
        "INSERT INTO annotators (annotator_id, label_studio_user_id) VALUES (%s, %s) ON CONFLICT DO NOTHING",
        [user, user],
    )
    row = db.execute(
        """
        INSERT INTO submitted_annotations (
            label_studio_annotation_id, task_key, annotator_id, status, result, text, began_at, submitted_at, changed_at
        )
        SELECT 1 + count(*), %s, %s, %s, '[]', %s, clock_timestamp(), clock_timestamp(), clock_timestamp()
        FROM submitted_annotations
        RETURNING annotation_id::text
        """,
        [task_key, user, status, text],
    ).fetchone()
    assert row is not None
    return str(row[0])


def test_a_lock_belongs_to_its_holder(db: Connection) -> None:
    sample_id = add_sample(db, "a")
    # As the seed document calls it.
    assert db.execute(f"SELECT * FROM lock_sample_for_annotation('{sample_id}', 'label_studio')").fetchall() == [
        (True, 3, "locked")
    ]
    since = db.execute("SELECT locked_at FROM samples").fetchone()
    assert db.execute(LOCK, [sample_id, "label_studio"]).fetchall() == [(True, 3, "locked")]
    assert db.execute("SELECT locked_at FROM samples").fetchone() == since
    refused = db.execute(LOCK, [sample_id, "somebody"]).fetchall()
    assert refused[0][:2] == (False, 3)
    assert refused[0][2].startswith("locked by label_studio since ")
    assert db.execute(UNLOCK, [sample_id, True, "somebody"]).fetchone() == (False,)
    assert db.execute("SELECT * FROM v_sync_status WHERE lock_status != 'unlocked'").fetchall() != []
    assert db.execute(f"SELECT unlock_sample('{sample_id}', TRUE)").fetchone() == (True,)
    assert db.execute("SELECT * FROM v_sync_status WHERE lock_status != 'unlocked'").fetchall() == []
    assert db.execute("SELECT unlock_sample(%s, TRUE)", [sample_id]).fetchone() == (False,)
    assert db.execute(
        "SELECT sync_version, last_changed_by::text, lock_status FROM v_sync_status WHERE sample_id = %s", [sample_id]
    ).fetchone() == (4, "operator", "unlocked")
    for no_holder in ("", None):
        with pytest.raises(psycopg.errors.NullValueNotAllowed):
            db.execute(LOCK, [sample_id, no_holder])


def test_what_cannot_be_annotated_cannot_be_locked(db: Connection) -> None:
    sample_id = add_sample(db, "a")
    db.execute("UPDATE samples SET removed_at = now()")
    assert db.execute(LOCK, [sample_id, "label_studio"]).fetchall() == [(False, 3, "the sample was removed")]
    assert db.execute(LOCK, [NOBODY, "label_studio"]).fetchall() == [(False, None, "no such sample")]
    assert db.execute(UNLOCK, [NOBODY, False, "label_studio"]).fetchone() == (False,)


def test_a_conflict_check_answers_true_or_false_whatever_it_is_asked(db: Connection) -> None:
    sample_id = add_sample(db, "a")
    assert db.execute(f"SELECT has_conflict FROM check_annotation_conflict('{sample_id}', 3)").fetchall() == [(False,)]
    assert db.execute(CHECK, [sample_id, 3]).fetchall() == [(False, [], "no conflict")]
    assert db.execute(CHECK, [sample_id, None]).fetchone() == (True, [], "the expected version is not known")
    assert db.execute(CHECK, [sample_id, 9]).fetchone() == (True, [], "the sample never had the expected version")
    assert db.execute(CHECK, [NOBODY, 1]).fetchone() == (True, [], "no such sample")
    change_text(db, sample_id, "translation", "hi")
    change_audio(db, sample_id)
    assert db.execute(CHECK, [sample_id, 3]).fetchone() == (
        True, ["audio", "translation"], "changed from version 3 to 5: audio, translation",
    )  # fmt: skip
    # Only what the work looks at counts.
    assert db.execute(CHECK_FOR, [sample_id, 4, "transcript_correction"]).fetchone() == (True, ["audio"])
    assert db.execute(CHECK_FOR, [sample_id, 4, "audio_segmentation"]).fetchone() == (True, ["audio"])
    change_text(db, sample_id, "translation", "hello")
    assert db.execute(CHECK_FOR, [sample_id, 5, "transcript_correction"]).fetchone() == (False, [])
    assert db.execute(CHECK_FOR, [sample_id, 5, "translation_review"]).fetchone() == (True, ["translation"])
    change_text(db, sample_id, "transcript", "chào")
    for task_type in ("transcript_correction", "translation_review", "audio_segmentation"):
        assert db.execute(CHECK_FOR, [sample_id, 6, task_type]).fetchone() == (True, ["transcript"])
    # A version that was raised without saying what changed is a conflict unless a task type rules it out.
    db.execute(LOCK, [sample_id, "label_studio"])
    db.execute(UNLOCK, [sample_id, True, "label_studio"])
    assert db.execute(CHECK_FOR, [sample_id, 7, None]).fetchone() == (True, ["unspecified"])
    assert db.execute(CHECK_FOR, [sample_id, 7, "translation_review"]).fetchone() == (False, [])


def test_a_conflict_sample_can_be_annotated_and_knows_its_origin(
    postgres: LocalPostgres, data_factory: str, db: Connection
) -> None:
    sample_id = add_sample(db, "a", priority=3)
    change_text(db, sample_id, "transcript", "bản mới")
    db.execute("UPDATE revisions SET withdrawn_at = now() WHERE version = 2 AND kind = 'transcript'")

    def copy(_number: int) -> str:
        with psycopg.connect(postgres.dsn("labelstation", data_factory)) as connection:
            row = connection.execute("SELECT create_conflict_sample(%s, 'Reason for conflict')", [sample_id]).fetchone()
            assert row is not None
            return str(row[0])

    with ThreadPoolExecutor(8) as pool:
        copies = list(pool.map(copy, range(8)))
    assert len(set(copies)) == 8
    made = db.execute(
        """
        SELECT
            c.external_id, c.audio_path = o.audio_path AND c.audio_file_md5 = o.audio_file_md5, c.priority,
            c.conflict_reason, c.locked_by, c.sync_version
        FROM samples AS c INNER JOIN samples AS o ON o.sample_id = c.parent_sample_id
        WHERE o.sample_id = %s ORDER BY c.external_id
        """,
        [sample_id],
    ).fetchall()
    assert made == [(f"a#conflict-{number}", True, 13, "Reason for conflict", None, 1) for number in range(1, 9)]
    for view, text in (("transcript_revisions", "xin chào các bạn"), ("translation_revisions", "hello everyone")):
        texts = db.execute(
            f"SELECT version, text, source::text FROM {view} WHERE sample_id = ANY (%s::uuid[])", [copies]
        ).fetchall()
        assert texts == [(1, text, "resolution")] * 8
    kinds = db.execute(
        "SELECT kind::text FROM sample_changes WHERE sample_id = %s ORDER BY kind", [copies[0]]
    ).fetchall()
    assert kinds == [("audio",), ("transcript",), ("translation",)]
    with pytest.raises(psycopg.errors.NoDataFound, match=f"sample {NOBODY} does not exist"):
        db.execute("SELECT create_conflict_sample(%s, 'x')", [NOBODY])


def test_gold_takes_the_current_text_and_replaces_itself(db: Connection) -> None:
    sample_id = add_sample(db, "a")
    first = db.execute(f"SELECT set_gold_standard('{sample_id}', 0.95, 'admin')").fetchone()
    change_text(db, sample_id, "transcript", "bản mới")
    second = db.execute("SELECT set_gold_standard(%s, 1, 'lan')", [sample_id]).fetchone()
    decomposed = "e\u0302\u0301"
    db.execute("SELECT set_gold_standard(%s, 0.5, 'lan', 'translation_review', %s)", [sample_id, decomposed])
    assert first != second
    gold = db.execute(
        "SELECT task_type::text, reference_text, expected_score::float, set_by FROM v_gold_standard_samples ORDER BY 1"
    ).fetchall()
    assert sorted(gold) == [
        ("transcript_correction", "bản mới", 1.0, "lan"),
        ("translation_review", "\u1ebf", 0.5, "lan"),
    ]
    assert db.execute("SELECT count(*) FROM gold_references").fetchone() == (3,)
    for score in (1.01, -0.1, None):
        with pytest.raises(psycopg.errors.CheckViolation):
            db.execute("SELECT set_gold_standard(%s, %s, 'admin')", [sample_id, score])
    with pytest.raises(psycopg.errors.NoDataFound, match="has no segmentation"):
        db.execute("SELECT set_gold_standard(%s, 0.9, 'admin', 'audio_segmentation')", [sample_id])
    with pytest.raises(psycopg.errors.CheckViolation):
        db.execute("SELECT set_gold_standard(%s, 0.9, 'admin', 'audio_segmentation', 'text')", [sample_id])
    with pytest.raises(psycopg.errors.NoDataFound):
        db.execute("SELECT set_gold_standard(%s)", [NOBODY])
    db.execute("UPDATE samples SET removed_at = now()")
    with pytest.raises(psycopg.errors.NoDataFound, match="removed"):
        db.execute("SELECT set_gold_standard(%s)", [sample_id])
    assert db.execute("SELECT count(*) FROM v_gold_standard_samples").fetchone() == (2,)


def test_accuracy_is_what_was_measured_and_names_the_annotator(db: Connection) -> None:
    sample_id = add_sample(db, "a")
    task = add_task(db, sample_id)
    add_annotation(db, task, user=1)  # before the reference was set: it may be where the reference comes from
    row = db.execute("SELECT set_gold_standard(%s, 0.95, 'admin')", [sample_id]).fetchone()
    assert row is not None
    assert db.execute("SELECT * FROM v_annotator_accuracy").fetchall() == []
    wrong = add_annotation(db, task, user=1, text="sai hết")
    skipped = add_annotation(db, task, user=2, status="skipped")
    view = """
        SELECT annotator, total_gold_annotations, average_expected_score::float, scored_gold_annotations,
            average_measured_score, completion_rate_percent::float
        FROM v_annotator_accuracy ORDER BY annotator
    """
    unmeasured = [("annotator-001", 1, 0.95, 0, None, 100.0), ("annotator-002", 1, 0.95, 0, None, 0.0)]
    assert db.execute(view).fetchall() == unmeasured
    score = """
        INSERT INTO gold_scores (gold_id, annotation_id, scorer, score, measures) VALUES (%s, %s, %s, %s, '{}')
    """
    db.execute(score, [row[0], wrong, "first", 1.0])
    db.execute(score, [row[0], wrong, "second", 0.25])
    assert db.execute(view).fetchall() == [("annotator-001", 1, 0.95, 1, 0.25, 100.0), unmeasured[1]]
    db.execute("UPDATE submitted_annotations SET status = 'withdrawn' WHERE annotation_id = %s", [skipped])
    assert db.execute("SELECT annotator FROM v_annotator_accuracy").fetchall() == [("annotator-001",)]


def test_pending_work_and_conflicts_are_found_by_the_seed_documents_queries(db: Connection) -> None:
    pending = """
        SELECT s.external_id, a.status::text, a.task_type::text
        FROM samples s
        JOIN annotations a ON s.sample_id = a.sample_id
        WHERE a.status IN ('pending', 'in_progress')
        ORDER BY s.external_id
    """
    waiting, begun, done, withdrawn = (add_sample(db, name) for name in ("waiting", "begun", "done", "withdrawn"))
    add_task(db, waiting)
    task = add_task(db, begun)
    db.execute("UPDATE tasks SET in_progress_since = now() WHERE task_key = %s", [task])
    add_annotation(db, add_task(db, done, state="done"))
    add_annotation(db, add_task(db, withdrawn), status="withdrawn")
    assert db.execute(pending).fetchall() == [
        ("begun", "in_progress", "transcript_correction"),
        ("waiting", "pending", "transcript_correction"),
        ("withdrawn", "pending", "transcript_correction"),
    ]
    assert db.execute("SELECT * FROM annotations WHERE conflict_detected = TRUE").fetchall() == []
    db.execute("UPDATE submitted_annotations SET conflict_detected = true WHERE status = 'completed'")
    conflicts = db.execute("SELECT * FROM annotations WHERE conflict_detected = TRUE")
    columns = [column.name for column in conflicts.description or ()]
    (conflict,) = [dict(zip(columns, row, strict=True)) for row in conflicts]
    assert (str(conflict["sample_id"]), conflict["annotator"]) == (done, "annotator-001")


def test_the_views_do_not_look_at_everything_for_each_row(db: Connection, postgres: LocalPostgres) -> None:
    with psycopg.connect(postgres.dsn("postgres", db.info.dbname), autocommit=True) as admin:
        admin.execute(
            """
            INSERT INTO samples (external_id, source_type) SELECT n::text, 'substack' FROM generate_series(1, 20000) n;
            INSERT INTO sample_changes (sample_id, sync_version, kind, source)
            SELECT sample_id, 1, 'transcript', 'crawler' FROM samples;
            INSERT INTO tasks (sample_id, task_type, project_id, label_studio_task_id, state)
            SELECT
                sample_id, 'transcript_correction', 1, arrival,
                CASE WHEN arrival % 100 = 0 THEN 'open' ELSE 'done' END::task_state
            FROM samples;
            INSERT INTO submitted_annotations (
                label_studio_annotation_id, task_key, status, result, began_at, submitted_at, changed_at
            )
            SELECT label_studio_task_id, task_key, 'completed', '[]', now(), now(), now()
            FROM tasks WHERE state = 'done';
            ANALYZE;
            """
        )
    for query in (
        "SELECT * FROM v_sync_status WHERE lock_status != 'unlocked'",
        "SELECT s.sample_id, a.status FROM samples s JOIN annotations a ON s.sample_id = a.sample_id "
        "WHERE a.status IN ('pending', 'in_progress')",
        "SELECT * FROM annotations WHERE conflict_detected = TRUE",
        "SELECT * FROM v_gold_standard_samples",
        "SELECT * FROM v_annotator_accuracy",
    ):
        row = db.execute(f"EXPLAIN (FORMAT JSON) {query}").fetchone()
        assert row is not None
        assert list(rescanned(row[0][0]["Plan"], inside_a_loop=False)) == [], query


def rescanned(plan: dict[str, Any], *, inside_a_loop: bool) -> list[str]:
    """Tables that a plan reads from end to end once for each row of something else."""
    found = []
    if inside_a_loop and plan["Node Type"] == "Seq Scan" and plan["Plan Rows"] > 1:
        found.append(plan["Relation Name"])
    for number, part in enumerate(plan.get("Plans", [])):
        subplan = part.get("Subplan Name", "")
        again = (plan["Node Type"] == "Nested Loop" and number == 1) or subplan.startswith("SubPlan")
        # These are read once, however often they are looked into.
        once = part["Node Type"] in ("Hash", "Materialize") or "hashed" in subplan
        found += rescanned(part, inside_a_loop=(inside_a_loop or again) and not once)
    return found
