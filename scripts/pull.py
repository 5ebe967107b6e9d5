#!/usr/bin/env python3
"""Bring home what annotators did in Label Studio: new, changed, skipped and deleted work."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID

from psycopg import sql

from station import cli, contract
from station.cli import log
from station.database import Connection, connect, connect_data_factory, exclusive, project_ids, recorded_run
from station.errors import ExitCode, SettingError
from station.settings import load_settings
from station.task_types import TASK_TYPES, TaskType

BATCH_ANNOTATIONS = 5000
# Label Studio stamps updated_at in its own process a moment before it writes, and its clock may differ a little.
# What is read twice is recognised and changes nothing.
READ_AGAIN = "5 minutes"
# Losing this much at once is more likely a restored or wrong database than somebody's decision.
MANY_DELETIONS = 100
MANY_DELETIONS_SHARE = 0.1


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
    run_id: int = 0
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
    """Read, apply, move the cursor."""
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
    cursor = read(pull)
    adopt_tasks(pull)
    work = note_work(pull)
    chosen = min(work, pull.options.limit or work)
    for start in range(0, chosen, BATCH_ANNOTATIONS):
        with pull.data_factory.transaction():
            apply_batch(pull, start, min(start + BATCH_ANNOTATIONS, chosen))
    pull.counts.left_for_next = work - chosen
    with pull.data_factory.transaction():
        withdraw_deleted(pull)
        note_drafts(pull)
        if work == chosen and not pull.options.since:
            move_cursor(pull, cursor)


# Reading Label Studio


@dataclass
class Cursor:
    """How far Label Studio has been read, and what was there then."""

    read_until: datetime
    tasks_max_id: int
    tasks_fingerprint: str
    annotations_max_id: int
    annotations_fingerprint: str


def read(pull: Pull) -> Cursor:
    """Copy what changed into temporary tables; returns how far the next pull can take this as read."""
    df, ls = pull.data_factory, pull.label_studio_db
    df.execute(
        """
        CREATE TEMPORARY TABLE IF NOT EXISTS feed (
            id bigint, task_id bigint, user_id integer, was_cancelled boolean, lead_time double precision,
            created_at timestamptz, updated_at timestamptz, draft_created_at timestamptz, result jsonb
        );
        CREATE TEMPORARY TABLE IF NOT EXISTS drafts (task_id bigint, started_at timestamptz);
        CREATE TEMPORARY TABLE IF NOT EXISTS live_tasks (id bigint PRIMARY KEY);
        CREATE TEMPORARY TABLE IF NOT EXISTS live_annotations (id bigint PRIMARY KEY);
        CREATE TEMPORARY TABLE IF NOT EXISTS reading (began_at timestamptz, compared boolean);
        """
    )
    df.execute("TRUNCATE feed, drafts, live_tasks, live_annotations, reading")
    last = last_cursor(pull)
    # Transactions that are open now may commit rows later that are stamped earlier: the next pull begins before the
    # oldest of them. Asked before the snapshot is taken, so that none can slip in between.
    (horizon,) = ls.execute(
        """
        SELECT least(clock_timestamp(), min(xact_start)) - %s::interval
        FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
        """,
        [READ_AGAIN],
    ).fetchone() or (None,)
    df.execute("INSERT INTO reading SELECT clock_timestamp(), false")
    since = pull.options.since or (None if pull.options.full or not last else last.read_until)
    with ls.transaction():
        ls.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        copy(
            pull,
            sql.SQL(
                """
                SELECT id, task_id, completed_by_id, was_cancelled, lead_time, created_at, updated_at, draft_created_at,
                    result
                FROM task_completion
                WHERE project_id = {project} AND (updated_at >= {since} OR created_at >= {since})
                """
            ).format(project=pull.project_id, since=since or datetime.min.replace(tzinfo=UTC)),
            "feed",
        )
        copy(
            pull,
            sql.SQL(
                """
                SELECT d.task_id, min(d.created_at)
                FROM tasks_annotationdraft AS d
                INNER JOIN task AS t ON t.id = d.task_id
                WHERE t.project_id = {} AND d.annotation_id IS NULL
                GROUP BY d.task_id
                """
            ).format(pull.project_id),
            "drafts",
        )
        if pull.options.full or last is None or something_is_gone(pull, last):
            for table, live in (("task", "live_tasks"), ("task_completion", "live_annotations")):
                copy(
                    pull,
                    sql.SQL("SELECT id FROM {} WHERE project_id = {}").format(sql.Identifier(table), pull.project_id),
                    live,
                )
            df.execute("UPDATE reading SET compared = true")
        tasks, annotations = (fingerprint(pull, table, None) for table in ("task", "task_completion"))
    df.execute("ANALYZE feed")
    return Cursor(horizon, *tasks, *annotations)


def last_cursor(pull: Pull) -> Cursor | None:
    """Where the last pull of this project stopped."""
    row = pull.data_factory.execute(
        """
        SELECT read_until, tasks_max_id, tasks_fingerprint, annotations_max_id, annotations_fingerprint
        FROM pull_cursors WHERE project_id = %s
        """,
        [pull.project_id],
    ).fetchone()
    return Cursor(*row) if row else None


def copy(pull: Pull, query: sql.Composed, table: str) -> None:
    """Stream a query's rows from Label Studio's database into a temporary table of ours."""
    with (
        pull.label_studio_db.cursor().copy(sql.SQL("COPY ({}) TO STDOUT").format(query)) as source,
        pull.data_factory.cursor().copy(sql.SQL("COPY {} FROM STDIN").format(sql.Identifier(table))) as target,
    ):
        for rows in source:
            target.write(rows)


def fingerprint(pull: Pull, table: str, max_id: int | None) -> tuple[int, str]:
    """The greatest id of a project's rows, and count and sum of the ids (up to a greatest one)."""
    row = pull.label_studio_db.execute(
        sql.SQL(
            """
            SELECT coalesce(max(id), 0), count(*) || ':' || coalesce(sum(id), 0)
            FROM {} WHERE project_id = %s AND id <= coalesce(%s, id)
            """
        ).format(sql.Identifier(table)),
        [pull.project_id, max_id],
    ).fetchone()
    return row if row else (0, "0:0")


def something_is_gone(pull: Pull, last: Cursor) -> bool:
    """Whether any task or annotation that was there at the last pull is not there any more.

    Deleted rows leave no trace in Label Studio. Counting what is left is far cheaper than comparing it.
    """
    tasks = fingerprint(pull, "task", last.tasks_max_id)[1]
    annotations = fingerprint(pull, "task_completion", last.annotations_max_id)[1]
    return (tasks, annotations) != (last.tasks_fingerprint, last.annotations_fingerprint)


def adopt_tasks(pull: Pull) -> None:
    """Find the keys of tasks whose ids were never recorded, because a push was interrupted or made them twice."""
    df = pull.data_factory
    df.execute(
        """
        CREATE TEMPORARY TABLE IF NOT EXISTS feed_tasks (task_id bigint PRIMARY KEY, task_key uuid NOT NULL);
        TRUNCATE feed_tasks;
        """
    )
    df.execute(
        """
        INSERT INTO feed_tasks
        SELECT f.task_id, t.task_key
        FROM (SELECT DISTINCT task_id FROM feed) AS f
        INNER JOIN tasks AS t ON t.project_id = %s AND t.label_studio_task_id = f.task_id
        """,
        [pull.project_id],
    )
    unknown = [
        task_id
        for (task_id,) in df.execute(
            "SELECT DISTINCT task_id FROM feed WHERE task_id NOT IN (SELECT task_id FROM feed_tasks)"
        )
    ]
    if not unknown:
        return
    keyed = pull.label_studio_db.execute(
        "SELECT id, meta ->> %(key)s FROM task WHERE id = ANY (%(ids)s) AND meta ->> %(key)s IS NOT NULL",
        {"key": contract.KEY, "ids": unknown},
    ).fetchall()
    df.execute(
        """
        INSERT INTO feed_tasks
        SELECT keyed.task_id, t.task_key
        FROM unnest(%s::bigint[], %s::text[]) AS keyed (task_id, key)
        INNER JOIN tasks AS t ON t.task_key::text = keyed.key AND t.project_id = %s
        """,
        [[task_id for task_id, _key in keyed], [key for _task_id, key in keyed], pull.project_id],
    )
    df.execute(
        """
        UPDATE tasks AS t
        SET label_studio_task_id = f.task_id, state = 'open', pushed_at = clock_timestamp()
        FROM (SELECT task_key, min(task_id) AS task_id FROM feed_tasks GROUP BY task_key) AS f
        WHERE t.task_key = f.task_key AND t.state = 'reserved'
        """
    )
    row = df.execute("SELECT count(*) FROM feed WHERE task_id NOT IN (SELECT task_id FROM feed_tasks)").fetchone()
    pull.counts.foreign = row[0] if row else 0
    if pull.counts.foreign:
        log.debug("%s annotations belong to tasks that were not pushed by labelstation", pull.counts.foreign)


def note_work(pull: Pull) -> int:
    """Number the annotations that the ledger does not have as they are now; returns how many."""
    df = pull.data_factory
    df.execute(
        """
        DROP TABLE IF EXISTS pg_temp.work;
        CREATE TEMPORARY TABLE work (position bigint PRIMARY KEY, id bigint NOT NULL, task_key uuid NOT NULL);
        """
    )
    number = df.execute(
        """
        INSERT INTO work
        SELECT row_number() OVER (ORDER BY f.updated_at, f.id) - 1, f.id, k.task_key
        FROM feed AS f
        INNER JOIN feed_tasks AS k USING (task_id)
        LEFT JOIN submitted_annotations AS a ON a.label_studio_annotation_id = f.id
        WHERE a.annotation_id IS NULL
            OR a.changed_at <> f.updated_at
            OR a.status = 'withdrawn'
            OR a.result <> f.result
        """
    ).rowcount
    df.execute("ANALYZE work")
    return number


# Applying


def apply_batch(pull: Pull, start: int, end: int) -> None:
    """Record a batch of annotations and what they cause. All of it or nothing."""
    df = pull.data_factory
    # Everybody who changes a sample's content holds its row; taken in one order, so that no two wait for each other.
    df.execute(
        """
        SELECT FROM samples
        WHERE sample_id IN (
            SELECT t.sample_id FROM work AS w INNER JOIN tasks AS t USING (task_key)
            WHERE w.position >= %s AND w.position < %s
        )
        ORDER BY sample_id
        FOR UPDATE
        """,
        [start, end],
    )
    judge(pull, start, end)
    df.execute(
        """
        INSERT INTO annotators (label_studio_user_id)
        SELECT DISTINCT v.user_id FROM verdict AS v
        WHERE v.user_id IS NOT NULL
            AND NOT EXISTS (SELECT FROM annotators AS w WHERE w.label_studio_user_id = v.user_id)
        ORDER BY v.user_id
        ON CONFLICT (label_studio_user_id) DO NOTHING
        """
    )
    df.execute(
        """
        INSERT INTO submitted_annotations AS a (
            label_studio_annotation_id, task_key, annotator_id, status, problem, result, text, segments,
            lead_time_seconds, began_at, submitted_at, changed_at, shown_version, current_version,
            conflict_detected, conflict_kinds, run_id
        )
        SELECT
            v.id, v.task_key, w.annotator_id, v.status, v.problem, v.result, v.text, v.segments,
            v.lead_time, v.began_at, v.created_at, v.updated_at, v.shown_version, v.current_version,
            v.conflict_kinds <> '{}', v.conflict_kinds, %s
        FROM verdict AS v
        LEFT JOIN annotators AS w ON w.label_studio_user_id = v.user_id
        ON CONFLICT (label_studio_annotation_id) DO UPDATE SET
            annotator_id = excluded.annotator_id,
            status = excluded.status,
            problem = excluded.problem,
            result = excluded.result,
            text = excluded.text,
            segments = excluded.segments,
            lead_time_seconds = excluded.lead_time_seconds,
            began_at = excluded.began_at,
            changed_at = excluded.changed_at,
            pulled_at = clock_timestamp(),
            shown_version = excluded.shown_version,
            current_version = excluded.current_version,
            conflict_detected = excluded.conflict_detected,
            conflict_kinds = excluded.conflict_kinds,
            conflict_resolution = NULL,
            resolved_at = NULL,
            resolved_by = NULL,
            run_id = excluded.run_id
        """,
        [pull.run_id or None],
    )
    withdrawn = withdraw_revisions(pull)
    added = add_revisions(pull)
    note_withdrawals(pull, withdrawn)
    pull.counts.revisions += added
    settle_tasks(pull, "SELECT DISTINCT task_key FROM verdict")
    count_verdicts(pull)


def judge(pull: Pull, start: int, end: int) -> None:
    """Decide for each annotation of a batch what it is, what it says, and whether its sample changed meanwhile."""
    extract = SEGMENTS if pull.task_type.revision_kind == "segmentation" else TEXT
    pull.data_factory.execute("DROP TABLE IF EXISTS pg_temp.verdict")
    pull.data_factory.execute(
        sql.SQL(
            """
            CREATE TEMPORARY TABLE verdict AS
            SELECT
                f.id, w.task_key, t.sample_id, t.gold_id, f.user_id, f.result, f.lead_time,
                began.at AS began_at, f.created_at, f.updated_at,
                CASE
                    WHEN f.was_cancelled THEN 'skipped'
                    WHEN said.problem IS NOT NULL THEN 'invalid'
                    ELSE 'completed'
                END::annotation_status AS status,
                CASE WHEN NOT f.was_cancelled THEN said.problem END AS problem,
                CASE WHEN NOT f.was_cancelled AND said.problem IS NULL THEN said.text END AS text,
                CASE WHEN NOT f.was_cancelled AND said.problem IS NULL THEN said.segments END AS segments,
                shown.sync_version AS shown_version,
                shown.audio_file_md5,
                s.sync_version AS current_version,
                CASE
                    WHEN f.was_cancelled OR said.problem IS NOT NULL OR t.gold_id IS NOT NULL THEN '{{}}'::change_kind[]
                    -- Only marked in Label Studio, not worked on again: what was decided stays.
                    WHEN before.status = 'completed' AND before.result = f.result THEN before.conflict_kinds
                    ELSE changed.kinds
                END AS conflict_kinds,
                before.annotation_id IS NULL AS is_new
            FROM work AS w
            INNER JOIN feed AS f USING (id)
            INNER JOIN tasks AS t USING (task_key)
            INNER JOIN samples AS s USING (sample_id)
            LEFT JOIN submitted_annotations AS before ON before.label_studio_annotation_id = f.id
            CROSS JOIN LATERAL (
                -- The lead time of work that is sent in again has grown by the breaks; the first one counts.
                SELECT coalesce(before.began_at, least(
                    f.created_at - make_interval(secs => greatest(coalesce(f.lead_time, 0), 0)), f.draft_created_at
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
            CROSS JOIN LATERAL (
                SELECT coalesce(array_agg(DISTINCT c.kind), '{{}}') AS kinds
                FROM sample_changes AS c
                WHERE c.sample_id = t.sample_id
                    AND c.sync_version > shown.sync_version
                    AND c.kind = ANY (relevant_changes({task_type}::task_type))
                    AND c.task_key IS DISTINCT FROM w.task_key
            ) AS changed
            CROSS JOIN LATERAL ({extract}) AS said
            WHERE w.position >= {start} AND w.position < {end}
            """
        ).format(
            task_type=pull.task_type.name,
            extract=extract.format(control=pull.task_type.control),
            start=start,
            end=end,
        )
    )
    pull.data_factory.execute("ANALYZE verdict")


# Controls are found by from_name: a note in another text area is not the transcript.
TEXT = sql.SQL(
    """
    SELECT
        said.text,
        NULL::jsonb AS segments,
        CASE
            WHEN said.text IS NULL THEN 'nothing was entered in ' || {control}
            WHEN said.text !~ '\\S' THEN {control} || ' is empty'
        END AS problem
    FROM (
        SELECT string_agg(normalize(part #>> '{{}}'), E'\\n' ORDER BY number) AS text
        FROM jsonb_path_query(
            f.result, '$[*] ? (@.from_name == $control).value.text[*]', jsonb_build_object('control', {control}::text)
        ) WITH ORDINALITY AS parts (part, number)
    ) AS said
    """
)
SEGMENTS = sql.SQL(
    """
    SELECT
        NULL AS text,
        said.segments,
        CASE
            WHEN said.segments IS NULL THEN 'no region was marked with ' || {control}
            WHEN said.broken THEN 'a region lacks its start, end or label, or ends before it starts'
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
    ) AS said
    """
)


def withdraw_revisions(pull: Pull) -> Sequence[UUID]:
    """Withdraw what these annotations caused before and no longer say; returns the samples."""
    rows = pull.data_factory.execute(
        """
        UPDATE revisions AS r
        SET withdrawn_at = clock_timestamp()
        FROM verdict AS v
        INNER JOIN submitted_annotations AS a ON a.label_studio_annotation_id = v.id
        WHERE NOT v.is_new
            AND r.annotation_id = a.annotation_id
            AND r.withdrawn_at IS NULL
            AND (
                v.status <> 'completed'
                OR v.conflict_kinds <> '{}'
                OR r.text IS DISTINCT FROM v.text
                OR r.segments IS DISTINCT FROM v.segments
            )
        RETURNING r.sample_id
        """
    ).fetchall()
    return [sample_id for (sample_id,) in rows]


def add_revisions(pull: Pull) -> int:
    """Make finished work without a conflict the samples' newest revisions, with their rows in the change ledger."""
    return pull.data_factory.execute(
        """
        WITH finished AS MATERIALIZED (
            SELECT
                v.sample_id, v.task_key, v.text, v.segments, v.audio_file_md5, a.annotation_id, s.transcript_language,
                w.pseudonym,
                row_number() OVER (PARTITION BY v.sample_id ORDER BY v.updated_at, v.id) AS number
            FROM verdict AS v
            INNER JOIN submitted_annotations AS a ON a.label_studio_annotation_id = v.id
            INNER JOIN samples AS s ON s.sample_id = v.sample_id
            LEFT JOIN annotators AS w USING (annotator_id)
            WHERE v.status = 'completed' AND v.conflict_kinds = '{}' AND v.gold_id IS NULL
                AND NOT EXISTS (
                    SELECT FROM revisions AS r WHERE r.annotation_id = a.annotation_id AND r.withdrawn_at IS NULL
                )
        ),
        raised AS (
            UPDATE samples AS s
            SET sync_version = s.sync_version + f.number, updated_at = now()
            FROM (SELECT sample_id, count(*) AS number FROM finished GROUP BY sample_id) AS f
            WHERE s.sample_id = f.sample_id
            RETURNING s.sample_id, s.sync_version - f.number AS version_before
        ),
        noted AS (
            INSERT INTO sample_changes (sample_id, sync_version, kind, content_hash, source, task_key, run_id)
            SELECT
                f.sample_id, r.version_before + f.number, %(kind)s::text::change_kind,
                md5(coalesce(f.text, f.segments::text)), 'human', f.task_key, %(run)s
            FROM finished AS f INNER JOIN raised AS r USING (sample_id)
        )
        INSERT INTO revisions (
            sample_id, kind, version, sync_version, text, segments, language, source, annotation_id, created_by,
            audio_file_md5
        )
        SELECT
            f.sample_id, %(kind)s::text::revision_kind, coalesce(latest.version, 0) + f.number, r.version_before + f.number,
            f.text, f.segments, latest.language, 'human', f.annotation_id, f.pseudonym, f.audio_file_md5
        FROM finished AS f
        INNER JOIN raised AS r USING (sample_id)
        LEFT JOIN LATERAL (
            SELECT version, language FROM revisions
            WHERE sample_id = f.sample_id AND kind = %(kind)s::text::revision_kind
            ORDER BY version DESC
            LIMIT 1
        ) AS latest ON true
        """,
        {"kind": pull.task_type.revision_kind, "run": pull.run_id or None},
    ).rowcount


def note_withdrawals(pull: Pull, sample_ids: Sequence[UUID]) -> None:
    """Note in the change ledger that samples fell back to an earlier text."""
    if not sample_ids:
        return
    pull.data_factory.execute(
        """
        WITH raised AS (
            UPDATE samples AS s
            SET sync_version = s.sync_version + 1, updated_at = now()
            WHERE s.sample_id = ANY (%(samples)s)
            RETURNING s.sample_id, s.sync_version
        )
        INSERT INTO sample_changes (sample_id, sync_version, kind, content_hash, source, run_id, task_key)
        SELECT
            r.sample_id, r.sync_version, %(kind)s::text::change_kind,
            (
                SELECT md5(coalesce(c.text, c.segments::text)) FROM revisions AS c
                WHERE c.sample_id = r.sample_id AND c.kind = %(kind)s::text::revision_kind AND c.withdrawn_at IS NULL
                ORDER BY c.version DESC
                LIMIT 1
            ),
            'human', %(run)s,
            (
                SELECT t.task_key FROM tasks AS t
                WHERE t.sample_id = r.sample_id AND t.task_type = %(task_type)s
                ORDER BY t.reserved_at DESC
                LIMIT 1
            )
        FROM raised AS r
        """,
        {
            "samples": sample_ids,
            "kind": pull.task_type.revision_kind,
            "run": pull.run_id or None,
            "task_type": pull.task_type.name,
        },
    )


def settle_tasks(pull: Pull, task_keys: str) -> None:
    """Bring tasks to the state that their annotations give them, and lock or unlock their samples accordingly.

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
                in_progress_since = NULL
            FROM (
                SELECT
                    o.task_key,
                    CASE
                        WHEN a.conflicts > 0 THEN 'conflict'
                        WHEN a.completed >= o.planned_overlap THEN 'done'
                        WHEN a.completed = 0 AND a.skipped > 0 THEN 'skipped'
                        -- A task that was replaced by a newer one does not come back.
                        WHEN o.state <> 'open' AND EXISTS (
                            SELECT FROM tasks AS newer
                            WHERE newer.sample_id = o.sample_id AND newer.task_type = o.task_type
                                AND newer.task_key <> o.task_key AND newer.state IN ('reserved', 'open')
                        ) THEN 'deleted'
                        ELSE 'open'
                    END::task_state AS state
                FROM tasks AS o
                CROSS JOIN LATERAL (
                    SELECT
                        count(*) FILTER (
                            WHERE a.status = 'completed' AND a.conflict_detected AND a.conflict_resolution IS NULL
                        ) AS conflicts,
                        count(*) FILTER (WHERE a.status = 'completed') AS completed,
                        count(*) FILTER (WHERE a.status = 'skipped') AS skipped
                    FROM submitted_annotations AS a
                    WHERE a.task_key = o.task_key
                ) AS a
                WHERE o.task_key IN ({task_keys})
            ) AS now_is
            WHERE t.task_key = now_is.task_key AND (t.state <> now_is.state OR t.in_progress_since IS NOT NULL)
            """
        ).format(task_keys=sql.SQL(task_keys))
    )
    lock_samples(pull, task_keys)


def lock_samples(pull: Pull, task_keys: str) -> None:
    """Samples with a task that somebody can still do are locked, the others are not.

    Label Studio offers a skipped task to the other annotators.
    """
    pull.data_factory.execute(
        sql.SQL(
            """
            UPDATE samples AS s
            SET
                locked_by = CASE WHEN o.is_open THEN 'label_studio' END,
                locked_at = CASE WHEN o.is_open THEN clock_timestamp() END
            FROM (
                SELECT t.sample_id, bool_or(every_task.state IN ('reserved', 'open', 'skipped')) AS is_open
                FROM (SELECT DISTINCT sample_id FROM tasks WHERE task_key IN ({task_keys})) AS t
                INNER JOIN tasks AS every_task USING (sample_id)
                GROUP BY t.sample_id
            ) AS o
            WHERE s.sample_id = o.sample_id
                AND (
                    (o.is_open AND s.locked_by IS NULL AND s.removed_at IS NULL)
                    OR (NOT o.is_open AND s.locked_by = 'label_studio')
                )
            """
        ).format(task_keys=sql.SQL(task_keys))
    )


def count_verdicts(pull: Pull) -> None:
    """Add a batch to the counts, and name each annotation that could not be used."""
    row = pull.data_factory.execute(
        """
        SELECT
            count(*) FILTER (WHERE is_new), count(*) FILTER (WHERE NOT is_new),
            count(*) FILTER (WHERE status = 'skipped'), count(*) FILTER (WHERE conflict_kinds <> '{}')
        FROM verdict
        """
    ).fetchone() or (0, 0, 0, 0)
    pull.counts.new += row[0]
    pull.counts.changed += row[1]
    pull.counts.skipped += row[2]
    pull.counts.conflicts += row[3]
    for annotation_id, sample_id, problem in pull.data_factory.execute(
        "SELECT id, sample_id, problem FROM verdict WHERE status = 'invalid' ORDER BY id"
    ):
        pull.counts.invalid += 1
        log.error(
            "annotation %s of sample %s: %s; correct or delete it in Label Studio", annotation_id, sample_id, problem
        )


# Deletions and drafts


def withdraw_deleted(pull: Pull) -> None:
    """Withdraw annotations and close tasks that are gone from Label Studio."""
    df = pull.data_factory
    if df.execute("SELECT FROM reading WHERE compared").fetchone() is None:
        return
    df.execute(
        """
        DROP TABLE IF EXISTS pg_temp.gone;
        CREATE TEMPORARY TABLE gone (annotation_id uuid, task_key uuid, sample_id uuid);
        DROP TABLE IF EXISTS pg_temp.gone_tasks;
        CREATE TEMPORARY TABLE gone_tasks (task_key uuid, sample_id uuid);
        """
    )
    # What was pushed while this pull was reading is not in what it read.
    gone = df.execute(
        """
        INSERT INTO gone
        SELECT a.annotation_id, t.task_key, t.sample_id
        FROM submitted_annotations AS a
        INNER JOIN tasks AS t USING (task_key)
        WHERE t.project_id = %s AND a.status <> 'withdrawn'
            AND NOT EXISTS (SELECT FROM live_annotations AS l WHERE l.id = a.label_studio_annotation_id)
        """,
        [pull.project_id],
    ).rowcount
    gone_tasks = df.execute(
        """
        INSERT INTO gone_tasks
        SELECT t.task_key, t.sample_id
        FROM tasks AS t
        WHERE t.project_id = %s AND t.state NOT IN ('reserved', 'failed', 'deleted')
            AND t.pushed_at < (SELECT began_at FROM reading)
            AND NOT EXISTS (SELECT FROM live_tasks AS l WHERE l.id = t.label_studio_task_id)
        """,
        [pull.project_id],
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
    df.execute("SELECT FROM samples WHERE sample_id IN (SELECT sample_id FROM gone) ORDER BY sample_id FOR UPDATE")
    rows = df.execute(
        """
        UPDATE revisions SET withdrawn_at = clock_timestamp()
        WHERE withdrawn_at IS NULL AND annotation_id IN (SELECT annotation_id FROM gone)
        RETURNING sample_id
        """
    ).fetchall()
    df.execute(
        """
        UPDATE submitted_annotations
        SET status = 'withdrawn', problem = NULL, conflict_detected = false, pulled_at = clock_timestamp(), run_id = %s
        WHERE annotation_id IN (SELECT annotation_id FROM gone)
        """,
        [pull.run_id or None],
    )
    note_withdrawals(pull, sorted({sample_id for (sample_id,) in rows}))
    df.execute(
        """
        UPDATE tasks SET state = 'deleted', closed_at = clock_timestamp(), in_progress_since = NULL
        WHERE task_key IN (SELECT task_key FROM gone_tasks)
        """
    )
    settle_tasks(pull, "SELECT task_key FROM gone EXCEPT SELECT task_key FROM gone_tasks")
    lock_samples(pull, "SELECT task_key FROM gone_tasks")
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
    """Remember how far Label Studio was read; what was not accepted is asked about again."""
    if pull.unaccepted_deletions:
        return
    pull.data_factory.execute(
        """
        INSERT INTO pull_cursors (
            project_id, read_until, tasks_max_id, tasks_fingerprint, annotations_max_id, annotations_fingerprint
        )
        VALUES (%s, %s, %s, %s, %s, %s)
        ON CONFLICT (project_id) DO UPDATE SET
            read_until = excluded.read_until,
            tasks_max_id = excluded.tasks_max_id,
            tasks_fingerprint = excluded.tasks_fingerprint,
            annotations_max_id = excluded.annotations_max_id,
            annotations_fingerprint = excluded.annotations_fingerprint
        """,
        [pull.project_id, *vars(cursor).values()],
    )


if __name__ == "__main__":
    cli.run(parser(), main)
