#!/usr/bin/env python3
"""Bring home what annotators did in Label Studio: new, changed, skipped and deleted work."""

import argparse
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime

from psycopg import sql

from station import cli, contract
from station.cli import log
from station.database import Connection, connect, connect_data_factory, exclusive, project_ids, recorded_run
from station.errors import ExitCode, SettingError
from station.settings import load_settings
from station.task_types import TASK_TYPES, TaskType

BATCH_ANNOTATIONS = 20_000
# Label Studio stamps updated_at in its own process a moment before it writes, and its clock may differ a little.
# What is read twice is recognised and changes nothing.
READ_AGAIN = "5 minutes"
# Losing this much at once is more likely a restored or wrong database than somebody's decision.
MANY_DELETIONS = 100
MANY_DELETIONS_SHARE = 0.1
# Ten years. What a browser claims to have taken longer would not fit into a point in time.
LONGEST_LEAD_TIME_SECONDS = 315_576_000


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = cli.parser(__doc__ or "")
    cli.add_task_type(options, required=False)
    cli.add_limit(options, "annotations of each task type; the next pull goes on there")
    cli.add_dry_run(options)
    options.add_argument(
        "--since",
        type=moment,
        metavar="TIME",
        help="read what changed since this time (ISO 8601, UTC unless it says otherwise), not since the last pull",
    )
    options.add_argument("--full", action="store_true", help="compare everything, not only what changed")
    options.add_argument(
        "--accept-deletions",
        action="store_true",
        help="withdraw deleted work even if it is so much that the pull would ask",
    )
    return options


def moment(value: str) -> datetime:
    """An argument that is a point in time."""
    try:
        parsed = datetime.fromisoformat(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a time such as 2026-01-31T12:00") from None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


@dataclass
class Counts:
    """What one pull did."""

    new: int = 0
    changed: int = 0
    skipped: int = 0
    revisions: int = 0
    conflicts: int = 0
    invalid: int = 0
    withdrawn: int = 0
    deleted_tasks: int = 0
    foreign: int = 0
    left_for_next: int = 0


@dataclass
class Pull:
    """What the steps of one pull need."""

    task_type: TaskType
    project_id: int
    data_factory: Connection
    label_studio_db: Connection
    options: argparse.Namespace
    run_id: int | None = None
    counts: Counts = field(default_factory=Counts)
    unaccepted_deletions: int = 0


def main(options: argparse.Namespace) -> ExitCode:
    """Pull each task type."""
    settings = load_settings(options.env_file)
    result: dict[str, object] = {}
    lines: list[str] = []
    code = ExitCode.DONE
    with (
        connect_data_factory(settings, "pull") as data_factory,
        connect(settings, "label_studio_dsn", "pull") as label_studio_db,
    ):
        contract.check(label_studio_db)
        projects = project_ids(data_factory, settings)
        wanted = [options.task_type] if options.task_type else list(TASK_TYPES.values())
        known = [task_type for task_type in wanted if task_type.name in projects]
        if not known:
            raise SettingError("no Label Studio project is known: run `make setup-projects`")
        for task_type in known:
            pull = Pull(task_type, projects[task_type.name], data_factory, label_studio_db, options)
            check_project(pull)
            code = max(code, pull_task_type(pull))
            result[task_type.name] = vars(pull.counts)
            lines.append(summary(pull))
    cli.print_result(options, result, lines)
    return code


def check_project(pull: Pull) -> None:
    """Refuse a Label Studio database without the project: everything in it would look deleted."""
    if pull.label_studio_db.execute("SELECT FROM project WHERE id = %s", [pull.project_id]).fetchone() is None:
        raise SettingError(
            f"LABEL_STUDIO_DSN: this Label Studio has no project {pull.project_id} for {pull.task_type.name}: is it "
            "the right database?"
        )


def summary(pull: Pull) -> str:
    """One line for people."""
    told = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in vars(pull.counts).items() if number)
    return f"{'would pull' if pull.options.dry_run else 'pulled'} {pull.task_type.name}: {told or 'nothing new'}"


def pull_task_type(pull: Pull) -> ExitCode:
    """Read and apply; how it ended."""
    with exclusive(pull.data_factory, f"pull of {pull.task_type.name}"):
        if pull.options.dry_run:
            # The same steps, taken back at the end.
            with pull.data_factory.transaction(force_rollback=True):
                carry_out(pull)
            return ExitCode.DONE
        with recorded_run(pull.data_factory, "pull", pull.task_type) as run:
            pull.run_id = run.run_id
            carry_out(pull)
            code = ExitCode.DONE
            if pull.counts.invalid:
                code = ExitCode.PARTIAL
            if pull.counts.conflicts or pull.unaccepted_deletions:
                code = ExitCode.PERSON_NEEDED
            run.counts.update(vars(pull.counts), exit_code=int(code))
    return code


def carry_out(pull: Pull) -> None:
    """The steps of a pull."""
    reading = read(pull)
    work = note_work(pull)
    chosen = min(work, pull.options.limit or work)
    with cli.progress(f"pull {pull.task_type.name}", chosen) as show:
        for start in range(0, chosen, BATCH_ANNOTATIONS):
            with pull.data_factory.transaction():
                apply_batch(pull, start, min(start + BATCH_ANNOTATIONS, chosen))
            show(start + BATCH_ANNOTATIONS)
    pull.counts.left_for_next = work - chosen
    with pull.data_factory.transaction():
        if reading.compared:
            withdraw_deleted(pull, reading)
        note_drafts(pull)
        # What was left, or not accepted, is met again by the next pull.
        if not (pull.counts.left_for_next or pull.unaccepted_deletions or pull.options.since):
            move_cursor(pull, reading.cursor)


# Reading Label Studio


@dataclass
class Cursor:
    """How far Label Studio has been read, and what was there then: a row of pull_cursors."""

    read_until: datetime
    unsettled_xid: str | None
    tasks_max_id: int = 0
    tasks_fingerprint: str = ""
    annotations_max_id: int = 0
    annotations_fingerprint: str = ""


CURSOR_COLUMNS = sql.SQL(", ").join(sql.Identifier(column.name) for column in fields(Cursor))


@dataclass
class Reading:
    """What reading Label Studio told.

    Attributes:
        began_at: when, by the clock of data_factory.
        cursor: how far the next pull can take Label Studio as read.
        compared: whether the ids of all that is there were read, because something that was there is gone.
    """

    began_at: datetime
    cursor: Cursor
    compared: bool


def read(pull: Pull) -> Reading:
    """Copy what changed since the last pull into temporary tables, all as of one moment."""
    df, ls = pull.data_factory, pull.label_studio_db
    df.execute(
        """
        DROP TABLE IF EXISTS pg_temp.feed, pg_temp.drafts, pg_temp.live_tasks, pg_temp.live_annotations;
        CREATE TEMPORARY TABLE feed (
            id bigint, task_id bigint, task_key uuid, user_id integer, was_cancelled boolean,
            lead_time double precision, created_at timestamptz, updated_at timestamptz, draft_created_at timestamptz,
            result jsonb
        );
        CREATE TEMPORARY TABLE drafts (task_id bigint, started_at timestamptz);
        CREATE TEMPORARY TABLE live_tasks (id bigint);
        CREATE TEMPORARY TABLE live_annotations (id bigint);
        """
    )
    (began_at,) = df.execute("SELECT clock_timestamp()").fetchone() or (None,)
    last = last_cursor(pull)
    with ls.transaction():
        ls.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        row = ls.execute(
            """
            SELECT clock_timestamp() - %s::interval, pg_snapshot_xmin(seen)::text, pg_snapshot_xmax(seen)::text
            FROM pg_current_snapshot() AS seen
            """,
            [READ_AGAIN],
        ).fetchone()
        assert row is not None
        read_until, oldest_open, next_to_come = row
        cursor = Cursor(read_until, oldest_open if oldest_open != next_to_come else None)
        copy(pull, "feed", changed_annotations(pull, last))
        copy(
            pull,
            "drafts",
            sql.SQL(
                """
                SELECT d.task_id, min(d.created_at)
                FROM tasks_annotationdraft AS d
                INNER JOIN task AS t ON t.id = d.task_id
                WHERE t.project_id = {} AND d.annotation_id IS NULL
                GROUP BY d.task_id
                """
            ).format(pull.project_id),
        )
        compared = pull.options.full or last is None or something_is_gone(pull, last)
        if compared:
            for table, live in (("task", "live_tasks"), ("task_completion", "live_annotations")):
                query = sql.SQL("SELECT id FROM {} WHERE project_id = {}")
                copy(pull, live, query.format(sql.Identifier(table), pull.project_id))
        cursor.tasks_max_id, cursor.tasks_fingerprint = fingerprint(pull, "task")
        cursor.annotations_max_id, cursor.annotations_fingerprint = fingerprint(pull, "task_completion")
    df.execute("ANALYZE feed (id, task_id, task_key)")
    return Reading(began_at, cursor, compared)


def changed_annotations(pull: Pull, last: Cursor | None) -> sql.Composed:
    """A query of the annotations to look at, with the key that their tasks' meta carries."""
    changed: list[sql.Composable] = []
    if pull.options.since:
        changed = [sql.SQL("a.updated_at >= {}").format(pull.options.since)]
    elif last and not pull.options.full:
        changed = [sql.SQL("a.updated_at >= {}").format(last.read_until)]
        if last.unsettled_xid:
            # Transactions were open when the last pull read. What they, or later ones, wrote has not been seen,
            # whatever time it was stamped with.
            changed.append(sql.SQL("age(a.xmin) <= age({}::xid8::xid)").format(last.unsettled_xid))
    return sql.SQL(
        """
        SELECT
            a.id, a.task_id, substring(t.meta ->> {key} FROM {uuid}), a.completed_by_id, a.was_cancelled, a.lead_time,
            a.created_at, a.updated_at, a.draft_created_at, coalesce(a.result, '[]')
        FROM task_completion AS a
        INNER JOIN task AS t ON t.id = a.task_id
        WHERE a.project_id = {project} AND ({changed})
        """
    ).format(
        key=contract.KEY,
        uuid="^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$",
        project=pull.project_id,
        changed=sql.SQL(" OR ").join(changed or [sql.SQL("true")]),
    )


def last_cursor(pull: Pull) -> Cursor | None:
    """Where the last pull of this project stopped."""
    query = sql.SQL("SELECT {} FROM pull_cursors WHERE project_id = {}").format(CURSOR_COLUMNS, pull.project_id)
    row = pull.data_factory.execute(query).fetchone()
    return Cursor(*row) if row else None


def copy(pull: Pull, table: str, query: sql.Composed) -> None:
    """Stream a query's rows from Label Studio's database into a temporary table of ours."""
    with (
        pull.label_studio_db.cursor().copy(sql.SQL("COPY ({}) TO STDOUT").format(query)) as source,
        pull.data_factory.cursor().copy(sql.SQL("COPY {} FROM STDIN").format(sql.Identifier(table))) as target,
    ):
        for rows in source:
            target.write(rows)


def fingerprint(pull: Pull, table: str, max_id: int | None = None) -> tuple[int, str]:
    """The greatest id of a project's rows, and count and sum of the ids (up to a greatest one)."""
    row = pull.label_studio_db.execute(
        sql.SQL(
            """
            SELECT coalesce(max(id), 0), count(*) || ':' || coalesce(sum(id), 0)
            FROM {} WHERE project_id = {} {}
            """
        ).format(
            sql.Identifier(table),
            pull.project_id,
            sql.SQL("AND id <= {}").format(max_id) if max_id is not None else sql.SQL(""),
        )
    ).fetchone()
    return row if row else (0, "0:0")


def something_is_gone(pull: Pull, last: Cursor) -> bool:
    """Whether any task or annotation that was there at the last pull is not there any more.

    Deleted rows leave no trace in Label Studio. Counting what is left is far cheaper than comparing it.
    """
    return (
        fingerprint(pull, "task", last.tasks_max_id)[1] != last.tasks_fingerprint
        or fingerprint(pull, "task_completion", last.annotations_max_id)[1] != last.annotations_fingerprint
    )


def note_work(pull: Pull) -> int:
    """Number the annotations whose work the ledger does not have as it is now; returns how many."""
    df = pull.data_factory
    # A push that was interrupted did not record the ids of its last tasks.
    df.execute(
        """
        UPDATE tasks AS t
        SET label_studio_task_id = f.task_id, state = 'open', pushed_at = clock_timestamp()
        FROM (SELECT task_key, min(task_id) AS task_id FROM feed GROUP BY task_key) AS f
        WHERE t.task_key = f.task_key AND t.project_id = %s AND t.label_studio_task_id IS NULL
        """,
        [pull.project_id],
    )
    # Only marked in Label Studio (starred, say), not worked on again: what was decided stays.
    df.execute(
        """
        UPDATE submitted_annotations AS a
        SET changed_at = f.updated_at
        FROM feed AS f
        WHERE a.label_studio_annotation_id = f.id AND a.status <> 'withdrawn' AND a.changed_at <> f.updated_at
            AND a.result = f.result AND (a.status = 'skipped') = f.was_cancelled
        """
    )
    df.execute("DROP TABLE IF EXISTS pg_temp.work")
    # The recorded id counts first, because people can change a task's meta. A task that was made twice has one key.
    # Annotations of tasks that are not ours get no position.
    df.execute(
        """
        CREATE TEMPORARY TABLE work AS
        SELECT
            CASE WHEN k.task_key IS NOT NULL THEN
                row_number() OVER (PARTITION BY k.task_key IS NULL ORDER BY f.updated_at, f.id) - 1
            END AS position,
            f.id, k.task_key
        FROM feed AS f
        LEFT JOIN tasks AS by_id ON by_id.project_id = %(project)s AND by_id.label_studio_task_id = f.task_id
        LEFT JOIN tasks AS by_key ON by_key.project_id = %(project)s AND by_key.task_key = f.task_key
        CROSS JOIN LATERAL (SELECT coalesce(by_id.task_key, by_key.task_key) AS task_key) AS k
        LEFT JOIN submitted_annotations AS a ON a.label_studio_annotation_id = f.id
        WHERE a.annotation_id IS NULL
            OR a.status = 'withdrawn'
            OR a.result <> f.result
            OR (a.status = 'skipped') <> f.was_cancelled
        """,
        {"project": pull.project_id},
    )
    df.execute("ANALYZE work")
    row = df.execute("SELECT count(position), count(*) FILTER (WHERE task_key IS NULL) FROM work").fetchone()
    number, pull.counts.foreign = row or (0, 0)
    return int(number)


# Applying


def apply_batch(pull: Pull, start: int, end: int) -> None:
    """Record a batch of annotations and what they cause. All of it or nothing."""
    chosen = sql.SQL("SELECT task_key FROM work WHERE position >= {} AND position < {}").format(start, end)
    lock_samples(pull, chosen)
    judge(pull, start, end)
    meet_annotators(pull)
    record_annotations(pull)
    pull.counts.revisions += add_revisions(pull)
    withdraw_revisions(pull, LAPSED)
    settle(pull, sql.SQL("SELECT task_key FROM verdict"))
    count_verdicts(pull)


def lock_samples(pull: Pull, task_keys: sql.Composable) -> None:
    """Hold the samples of these tasks, as everybody does who changes a sample; in one order, so that no two block."""
    pull.data_factory.execute(
        sql.SQL(
            """
            SELECT FROM samples
            WHERE sample_id IN (SELECT t.sample_id FROM tasks AS t WHERE t.task_key IN ({}))
            ORDER BY sample_id
            FOR UPDATE
            """
        ).format(task_keys)
    )


def judge(pull: Pull, start: int, end: int) -> None:
    """Decide for each annotation of a batch what it is, what it says, and whether its sample changed meanwhile."""
    said = SEGMENTS if pull.task_type.revision_kind == "segmentation" else TEXT
    pull.data_factory.execute("DROP TABLE IF EXISTS pg_temp.verdict")
    pull.data_factory.execute(
        sql.SQL(
            """
            CREATE TEMPORARY TABLE verdict AS
            SELECT
                f.id AS label_studio_annotation_id, w.task_key, t.sample_id, t.gold_id, f.user_id, f.result,
                f.lead_time AS lead_time_seconds, began.at AS began_at, f.created_at AS submitted_at,
                f.updated_at AS changed_at, judged.status,
                CASE judged.status WHEN 'invalid' THEN said.problem END AS problem,
                CASE judged.status WHEN 'completed' THEN said.text END AS text,
                CASE judged.status WHEN 'completed' THEN said.segments END AS segments,
                shown.sync_version AS shown_version, shown.audio_file_md5, s.sync_version AS current_version,
                conflict.kinds <> '{{}}' AS conflict_detected, conflict.kinds AS conflict_kinds,
                before.annotation_id IS NULL AS is_new
            FROM work AS w
            INNER JOIN feed AS f USING (id)
            INNER JOIN tasks AS t ON t.task_key = w.task_key
            INNER JOIN samples AS s USING (sample_id)
            LEFT JOIN submitted_annotations AS before ON before.label_studio_annotation_id = f.id
            CROSS JOIN LATERAL (
                -- The lead time of work that is sent in again has grown by the breaks; the first one counts.
                SELECT coalesce(before.began_at, least(
                    f.created_at - make_interval(secs => greatest(least(f.lead_time, {longest}), 0)),
                    f.draft_created_at
                )) AS at
            ) AS began
            CROSS JOIN LATERAL (
                -- Before the first showing nobody can have seen anything: clocks differ, or the lead time is wrong.
                SELECT shown.sync_version, shown.audio_file_md5
                FROM task_showings AS shown
                WHERE shown.task_key = w.task_key
                ORDER BY shown.shown_since <= began.at DESC, abs(extract(epoch FROM shown.shown_since - began.at))
                LIMIT 1
            ) AS shown
            CROSS JOIN LATERAL ({said}) AS said
            CROSS JOIN LATERAL (
                SELECT CASE
                    WHEN f.was_cancelled THEN 'skipped'
                    WHEN said.problem IS NOT NULL THEN 'invalid'
                    ELSE 'completed'
                END::annotation_status AS status
            ) AS judged
            CROSS JOIN LATERAL (
                SELECT ARRAY(
                    SELECT DISTINCT c.kind
                    FROM sample_changes AS c
                    WHERE judged.status = 'completed'
                        AND t.gold_id IS NULL
                        AND c.sample_id = t.sample_id
                        AND c.sync_version > shown.sync_version
                        AND c.kind = ANY (relevant_changes({task_type}::task_type))
                        AND c.task_key IS DISTINCT FROM w.task_key
                ) AS kinds
            ) AS conflict
            WHERE w.position >= {start} AND w.position < {end}
            """
        ).format(
            task_type=pull.task_type.name,
            longest=LONGEST_LEAD_TIME_SECONDS,
            said=said.format(control=pull.task_type.control),
            start=start,
            end=end,
        )
    )
    pull.data_factory.execute(
        "ANALYZE verdict (label_studio_annotation_id, sample_id, task_key, status, conflict_detected, is_new)"
    )


# Controls are found by from_name: a note in another text area is not the transcript.
TEXT = sql.SQL(
    """
    SELECT
        entered.text,
        NULL::jsonb AS segments,
        CASE
            WHEN entered.text IS NULL THEN 'nothing was entered in ' || {control}
            WHEN entered.text !~ '\\S' THEN {control} || ' is empty'
        END AS problem
    FROM (
        SELECT string_agg(normalize(part #>> '{{}}'), E'\\n' ORDER BY number) AS text
        FROM jsonb_path_query(
            f.result, '$[*] ? (@.from_name == $control).value.text[*]', jsonb_build_object('control', {control}::text)
        ) WITH ORDINALITY AS parts (part, number)
    ) AS entered
    """
)
SEGMENTS = sql.SQL(
    """
    SELECT
        NULL AS text,
        marked.segments,
        CASE
            WHEN marked.segments IS NULL THEN 'no region was marked with ' || {control}
            WHEN marked.broken THEN 'a region lacks its start, end or label, or ends before it starts'
        END AS problem
    FROM (
        SELECT
            jsonb_agg(
                jsonb_build_object(
                    'start', region #> '{{value,start}}', 'end', region #> '{{value,end}}',
                    'label', region #> '{{value,labels,0}}', 'tags', coalesce(tags.tags, '[]')
                )
                ORDER BY CASE jsonb_typeof(region #> '{{value,start}}')
                    WHEN 'number' THEN (region #>> '{{value,start}}')::numeric END, number
            ) AS segments,
            bool_or(
                CASE
                    WHEN jsonb_typeof(region #> '{{value,start}}') = 'number'
                        AND jsonb_typeof(region #> '{{value,end}}') = 'number'
                        AND jsonb_typeof(region #> '{{value,labels,0}}') = 'string'
                    THEN (region #>> '{{value,start}}')::numeric >= (region #>> '{{value,end}}')::numeric
                    ELSE true
                END
            ) AS broken
        FROM jsonb_path_query(
            f.result, '$[*] ? (@.from_name == $control)', jsonb_build_object('control', {control}::text)
        ) WITH ORDINALITY AS regions (region, number)
        LEFT JOIN LATERAL (
            SELECT jsonb_agg(tag) AS tags
            FROM jsonb_path_query(
                f.result, '$[*] ? (@.from_name == "segment_tags" && @.id == $region).value.choices[*]',
                jsonb_build_object('region', region -> 'id')
            ) AS tag
        ) AS tags ON true
    ) AS marked
    """
)


def meet_annotators(pull: Pull) -> None:
    """Give people that were not seen before the next pseudonyms."""
    unknown = sql.SQL(
        "SELECT user_id FROM verdict WHERE user_id IS NOT NULL EXCEPT SELECT label_studio_user_id FROM annotators"
    )
    if not pull.data_factory.execute(unknown).fetchone():
        return
    # Counted under a lock, not by a sequence: what is rolled back leaves no gap.
    pull.data_factory.execute("LOCK TABLE annotators IN SHARE ROW EXCLUSIVE MODE")
    pull.data_factory.execute(
        sql.SQL(
            """
            INSERT INTO annotators (annotator_id, label_studio_user_id)
            SELECT (SELECT count(*) FROM annotators) + row_number() OVER (ORDER BY user_id), user_id
            FROM ({}) AS unknown
            """
        ).format(unknown)
    )


RECORDED = (
    "label_studio_annotation_id", "task_key", "status", "problem", "result", "text", "segments", "lead_time_seconds",
    "began_at", "submitted_at", "changed_at", "shown_version", "current_version", "conflict_detected", "conflict_kinds",
)  # fmt: skip


def record_annotations(pull: Pull) -> None:
    """Write a batch of annotations as they are now; what was resolved about their earlier form no longer holds."""
    pull.data_factory.execute(
        sql.SQL(
            """
            INSERT INTO submitted_annotations ({recorded}, annotator_id, run_id)
            SELECT {recorded}, w.annotator_id, {run}
            FROM verdict AS v
            LEFT JOIN annotators AS w ON w.label_studio_user_id = v.user_id
            ON CONFLICT (label_studio_annotation_id) DO UPDATE SET
                ({recorded}) = ROW ({excluded}),
                annotator_id = excluded.annotator_id,
                run_id = excluded.run_id,
                pulled_at = excluded.pulled_at,
                conflict_resolution = NULL,
                resolved_at = NULL,
                resolved_by = NULL
            """
        ).format(
            recorded=sql.SQL(", ").join(map(sql.Identifier, RECORDED)),
            excluded=sql.SQL(", ").join(sql.Identifier("excluded", name) for name in RECORDED),
            run=pull.run_id,
        )
    )


def add_revisions(pull: Pull) -> int:
    """Make finished work without a conflict the samples' newest revisions, with their rows in the change ledger."""
    return pull.data_factory.execute(
        """
        WITH finished AS MATERIALIZED (
            SELECT
                v.sample_id, v.task_key, v.text, v.segments, v.audio_file_md5, a.annotation_id, w.pseudonym,
                row_number() OVER of_sample AS number,
                v.current_version + row_number() OVER of_sample AS sync_version
            FROM verdict AS v
            INNER JOIN submitted_annotations AS a USING (label_studio_annotation_id)
            LEFT JOIN annotators AS w USING (annotator_id)
            WHERE v.status = 'completed' AND NOT v.conflict_detected AND v.gold_id IS NULL
                AND (v.is_new OR NOT EXISTS (
                    SELECT FROM revisions AS r
                    WHERE r.annotation_id = a.annotation_id AND r.withdrawn_at IS NULL
                        AND r.text IS NOT DISTINCT FROM v.text AND r.segments IS NOT DISTINCT FROM v.segments
                ))
            WINDOW of_sample AS (PARTITION BY v.sample_id ORDER BY v.changed_at, v.label_studio_annotation_id)
        ),
        noted AS (
            INSERT INTO sample_changes (sample_id, sync_version, kind, content_hash, source, task_key, run_id)
            SELECT
                f.sample_id, f.sync_version, %(kind)s::text::change_kind, md5(coalesce(f.text, f.segments::text)),
                'human', f.task_key, %(run)s
            FROM finished AS f
        )
        INSERT INTO revisions (
            sample_id, kind, version, sync_version, text, segments, language, source, annotation_id, created_by,
            audio_file_md5
        )
        SELECT
            f.sample_id, %(kind)s::text::revision_kind, coalesce(latest.version, 0) + f.number, f.sync_version,
            f.text, f.segments, latest.language, 'human', f.annotation_id, f.pseudonym, f.audio_file_md5
        FROM finished AS f
        LEFT JOIN LATERAL (
            SELECT version, language FROM revisions
            WHERE sample_id = f.sample_id AND kind = %(kind)s::text::revision_kind
            ORDER BY version DESC
            LIMIT 1
        ) AS latest ON true
        """,
        {"kind": pull.task_type.revision_kind, "run": pull.run_id},
    ).rowcount


# What these annotations caused before and do not say any more.
LAPSED = sql.SQL(
    """
    SELECT r.revision_id
    FROM verdict AS v
    INNER JOIN submitted_annotations AS a USING (label_studio_annotation_id)
    INNER JOIN revisions AS r USING (annotation_id)
    WHERE NOT v.is_new AND (
        v.status <> 'completed' OR v.conflict_detected
        OR r.text IS DISTINCT FROM v.text OR r.segments IS DISTINCT FROM v.segments
    )
    """
)


def withdraw_revisions(pull: Pull, lapsed: sql.Composable) -> None:
    """Withdraw revisions; a sample that falls back to an earlier text by it has changed, and the ledger says so.

    Args:
        pull: the pull.
        lapsed: query of the revisions' ids.
    """
    pull.data_factory.execute(
        sql.SQL(
            """
            WITH withdrawn AS (
                UPDATE revisions SET withdrawn_at = clock_timestamp()
                WHERE revision_id IN ({lapsed}) AND withdrawn_at IS NULL
                RETURNING revision_id, sample_id, kind, version, annotation_id
            )
            INSERT INTO sample_changes (sample_id, sync_version, kind, content_hash, source, run_id, task_key)
            SELECT
                w.sample_id, s.sync_version + 1, w.kind::text::change_kind,
                (
                    SELECT md5(coalesce(r.text, r.segments::text)) FROM revisions AS r
                    WHERE r.sample_id = w.sample_id AND r.kind = w.kind AND r.withdrawn_at IS NULL
                        AND r.revision_id NOT IN (SELECT revision_id FROM withdrawn)
                    ORDER BY r.version DESC
                    LIMIT 1
                ),
                'human', %s, a.task_key
            FROM withdrawn AS w
            INNER JOIN samples AS s USING (sample_id)
            INNER JOIN submitted_annotations AS a USING (annotation_id)
            WHERE NOT EXISTS (
                SELECT FROM revisions AS newer
                WHERE newer.sample_id = w.sample_id AND newer.kind = w.kind AND newer.version > w.version
                    AND newer.withdrawn_at IS NULL
            )
            """
        ).format(lapsed=lapsed),
        [pull.run_id],
    )


def settle(pull: Pull, task_keys: sql.Composable) -> None:
    """Bring tasks to the state that their annotations give them, and their samples to what ledger and tasks say.

    Args:
        pull: the pull.
        task_keys: query of the tasks' keys.
    """
    pull.data_factory.execute(
        sql.SQL(
            """
            UPDATE tasks AS t
            SET
                state = now_is.state,
                closed_at = CASE WHEN now_is.state <> 'open' THEN coalesce(t.closed_at, clock_timestamp()) END,
                in_progress_since = CASE WHEN now_is.state = 'open' THEN t.in_progress_since END
            FROM (
                SELECT
                    o.task_key,
                    CASE
                        WHEN o.state = 'deleted' AND count(a.task_key) = 0 THEN 'deleted'
                        WHEN count(*) FILTER (
                            WHERE a.status = 'completed' AND a.conflict_detected AND a.conflict_resolution IS NULL
                        ) > 0 THEN 'conflict'
                        WHEN count(*) FILTER (WHERE a.status = 'completed') >= o.planned_overlap THEN 'done'
                        WHEN bool_and(a.status = 'skipped') AND count(*) >= o.planned_overlap THEN 'skipped'
                        -- A task that was replaced by a newer one does not come back.
                        WHEN o.state <> 'open' AND EXISTS (
                            SELECT FROM tasks AS newer
                            WHERE newer.sample_id = o.sample_id AND newer.task_type = o.task_type
                                AND newer.task_key <> o.task_key AND newer.state IN ('reserved', 'open')
                        ) THEN 'deleted'
                        ELSE 'open'
                    END::task_state AS state
                FROM tasks AS o
                LEFT JOIN submitted_annotations AS a
                    ON a.task_key = o.task_key AND a.status NOT IN ('withdrawn', 'invalid')
                WHERE o.task_key IN ({task_keys})
                GROUP BY o.task_key
            ) AS now_is
            WHERE t.task_key = now_is.task_key AND t.state <> now_is.state
            """
        ).format(task_keys=task_keys)
    )
    pull.data_factory.execute(
        sql.SQL(
            """
            WITH now_is AS MATERIALIZED (
                SELECT
                    o.sample_id,
                    greatest(
                        o.sync_version,
                        (SELECT max(c.sync_version) FROM sample_changes AS c WHERE c.sample_id = o.sample_id)
                    ) AS sync_version,
                    CASE
                        WHEN o.locked_by <> 'label_studio' THEN o.locked_by
                        WHEN o.removed_at IS NULL AND EXISTS (
                            -- Label Studio offers a skipped task to the other annotators.
                            SELECT FROM tasks AS t
                            WHERE t.sample_id = o.sample_id AND t.state IN ('reserved', 'open', 'skipped')
                        ) THEN 'label_studio'
                    END AS locked_by
                FROM samples AS o
                WHERE o.sample_id IN (SELECT t.sample_id FROM tasks AS t WHERE t.task_key IN ({task_keys}))
            )
            UPDATE samples AS s
            SET
                sync_version = now_is.sync_version,
                locked_by = now_is.locked_by,
                locked_at = CASE WHEN now_is.locked_by IS NOT NULL THEN coalesce(s.locked_at, clock_timestamp()) END,
                updated_at = CASE WHEN now_is.sync_version > s.sync_version THEN now() ELSE s.updated_at END
            FROM now_is
            WHERE s.sample_id = now_is.sample_id
                AND (s.sync_version, s.locked_by) IS DISTINCT FROM (now_is.sync_version, now_is.locked_by)
            """
        ).format(task_keys=task_keys)
    )


def count_verdicts(pull: Pull) -> None:
    """Add a batch to the counts, and name each annotation that could not be used."""
    row = pull.data_factory.execute(
        """
        SELECT
            count(*) FILTER (WHERE is_new), count(*) FILTER (WHERE NOT is_new),
            count(*) FILTER (WHERE status = 'skipped'), count(*) FILTER (WHERE conflict_detected)
        FROM verdict
        """
    ).fetchone() or (0, 0, 0, 0)
    pull.counts.new += row[0]
    pull.counts.changed += row[1]
    pull.counts.skipped += row[2]
    pull.counts.conflicts += row[3]
    for row in pull.data_factory.execute(
        "SELECT label_studio_annotation_id, sample_id, problem FROM verdict WHERE status = 'invalid' ORDER BY 1"
    ):
        pull.counts.invalid += 1
        log.error("annotation %s of sample %s: %s; correct or delete it in Label Studio", *row)


# Deletions and drafts


def withdraw_deleted(pull: Pull, reading: Reading) -> None:
    """Withdraw annotations and close tasks that are gone from Label Studio."""
    df = pull.data_factory
    df.execute(
        """
        DROP TABLE IF EXISTS pg_temp.gone, pg_temp.gone_tasks;
        CREATE TEMPORARY TABLE gone (annotation_id uuid, task_key uuid);
        CREATE TEMPORARY TABLE gone_tasks (task_key uuid);
        """
    )
    gone = df.execute(
        """
        INSERT INTO gone
        SELECT a.annotation_id, t.task_key
        FROM submitted_annotations AS a
        INNER JOIN tasks AS t USING (task_key)
        WHERE t.project_id = %s AND a.status <> 'withdrawn'
            AND NOT EXISTS (SELECT FROM live_annotations AS l WHERE l.id = a.label_studio_annotation_id)
        """,
        [pull.project_id],
    ).rowcount
    # What was pushed while this pull was reading is not in what it read.
    gone_tasks = df.execute(
        """
        INSERT INTO gone_tasks
        SELECT t.task_key
        FROM tasks AS t
        WHERE t.project_id = %s AND t.state NOT IN ('reserved', 'failed', 'deleted') AND t.pushed_at < %s
            AND NOT EXISTS (SELECT FROM live_tasks AS l WHERE l.id = t.label_studio_task_id)
        """,
        [pull.project_id, reading.began_at],
    ).rowcount
    if gone + gone_tasks == 0:
        return
    (known,) = df.execute("SELECT count(*) FROM tasks WHERE project_id = %s", [pull.project_id]).fetchone() or (0,)
    many = max(MANY_DELETIONS, known * MANY_DELETIONS_SHARE)
    if max(gone, gone_tasks) > many and not pull.options.accept_deletions:
        pull.unaccepted_deletions = gone + gone_tasks
        log.error(
            "%s annotations and %s tasks of project %s have vanished from Label Studio: nothing was withdrawn. If they "
            "were deleted on purpose, run pull again with --accept-deletions; if Label Studio was restored or is "
            "another one, mend that first",
            gone,
            gone_tasks,
            pull.project_id,
        )
        return
    touched = sql.SQL("SELECT task_key FROM gone UNION SELECT task_key FROM gone_tasks")
    lock_samples(pull, touched)
    withdraw_revisions(pull, sql.SQL("SELECT r.revision_id FROM gone INNER JOIN revisions AS r USING (annotation_id)"))
    df.execute(
        """
        UPDATE submitted_annotations
        SET status = 'withdrawn', problem = NULL, conflict_detected = false, pulled_at = clock_timestamp(), run_id = %s
        WHERE annotation_id IN (SELECT annotation_id FROM gone)
        """,
        [pull.run_id],
    )
    df.execute(
        """
        UPDATE tasks SET state = 'deleted', closed_at = clock_timestamp(), in_progress_since = NULL
        WHERE task_key IN (SELECT task_key FROM gone_tasks)
        """
    )
    settle(pull, touched)
    pull.counts.withdrawn = gone
    pull.counts.deleted_tasks = gone_tasks


def note_drafts(pull: Pull) -> None:
    """Note which open tasks somebody has begun."""
    pull.data_factory.execute(
        """
        UPDATE tasks AS t
        SET in_progress_since = d.started_at
        FROM tasks AS o
        LEFT JOIN drafts AS d ON d.task_id = o.label_studio_task_id
        WHERE t.task_key = o.task_key AND o.project_id = %s AND o.task_type = %s AND o.state = 'open'
            AND o.in_progress_since IS DISTINCT FROM d.started_at
        """,
        [pull.project_id, pull.task_type.name],
    )


def move_cursor(pull: Pull, cursor: Cursor) -> None:
    """Remember how far Label Studio was read."""
    pull.data_factory.execute(
        sql.SQL(
            """
            INSERT INTO pull_cursors (project_id, {columns}) VALUES ({project}, {values})
            ON CONFLICT (project_id) DO UPDATE SET ({columns}) = ROW ({values})
            """
        ).format(
            columns=CURSOR_COLUMNS,
            project=pull.project_id,
            values=sql.SQL(", ").join(map(sql.Literal, vars(cursor).values())),
        )
    )


if __name__ == "__main__":
    cli.run(parser(), main)
