"""Where every sample stands for one task type."""

from psycopg import sql

from station.task_types import TaskType

# What `standing` can be, in the order in which it is reported.
WAITING = "waiting"
OPEN = "open"
DONE = "done"
SKIPPED = "skipped"
CONFLICT = "conflict"
REFUSED = "refused"
LOCKED = "locked"
REMOVED = "removed"
NO_AUDIO = "no audio"


def without(text: str) -> str:
    """The standing of samples that lack a text which the task type needs."""
    return f"no {text}"


def standing(task_type: TaskType) -> sql.Composed:
    """A query of (sample_id, priority, arrival, standing), one row a sample.

    A sample stands as its latest task does, if it has one. Work that was done on audio that has been replaced since,
    and tasks that Label Studio refused before the sample changed, no longer count.
    """
    missing_texts = [
        sql.SQL(
            r"""WHEN NOT coalesce((
                SELECT r.text ~ '\S'
                FROM revisions AS r
                WHERE r.sample_id = s.sample_id AND r.kind = {kind}::revision_kind AND r.withdrawn_at IS NULL
                ORDER BY r.version DESC
                LIMIT 1
            ), false) THEN {standing}"""
        ).format(kind=kind, standing=without(kind))
        for kind in task_type.needs_texts
    ]
    missing_audio = [sql.SQL("WHEN s.audio_path IS NULL THEN {}").format(NO_AUDIO)] if task_type.needs_audio else []
    return sql.SQL(
        """
        SELECT
            s.sample_id, s.priority, s.arrival,
            CASE
                WHEN s.removed_at IS NOT NULL THEN {removed}
                WHEN latest.state IN ('reserved', 'open') THEN {open}
                WHEN latest.state = 'conflict' THEN {conflict}
                WHEN latest.state = 'skipped' THEN {skipped}
                WHEN latest.state = 'done' AND latest.audio_file_md5 IS NOT DISTINCT FROM s.audio_file_md5 THEN {done}
                WHEN latest.state = 'failed' AND latest.sync_version = s.sync_version THEN {refused}
                WHEN s.locked_by IS NOT NULL THEN {locked}
                {missing}
                ELSE {waiting}
            END AS standing
        FROM samples AS s
        LEFT JOIN (
            SELECT DISTINCT ON (t.sample_id) t.sample_id, t.state, shown.audio_file_md5, shown.sync_version
            FROM tasks AS t
            INNER JOIN task_showings AS shown USING (task_key)
            WHERE t.task_type = {task_type}::task_type AND t.gold_id IS NULL
            ORDER BY t.sample_id, t.reserved_at DESC, shown.shown_since DESC
        ) AS latest USING (sample_id)
        """
    ).format(
        removed=REMOVED,
        open=OPEN,
        conflict=CONFLICT,
        skipped=SKIPPED,
        done=DONE,
        refused=REFUSED,
        locked=LOCKED,
        waiting=WAITING,
        missing=sql.SQL(" ").join(missing_audio + missing_texts),
        task_type=task_type.name,
    )


def counts(task_type: TaskType) -> sql.Composed:
    """A query of (standing, number of samples)."""
    return sql.SQL("SELECT standing, count(*) FROM ({}) AS s GROUP BY standing ORDER BY standing").format(
        standing(task_type)
    )
