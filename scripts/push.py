#!/usr/bin/env python3
"""Give samples that need it a task in Label Studio, each exactly once."""

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread
from typing import Any
from urllib.parse import quote
from uuid import UUID

import requests
from psycopg import sql

from station import cli, contract
from station.cli import log
from station.database import Connection, connect, connect_data_factory, exclusive, project_id_of, recorded_run
from station.errors import ExitCode, SettingError
from station.label_studio import LabelStudio, NoAnswerError, RefusedError
from station.settings import Settings, load_settings
from station.standing import WAITING, counts, standing
from station.task_types import TaskType

BATCH_TASKS = 1000
BATCH_BYTES = 16 * 1024 * 1024
# How long to look for tasks whose import was cut off before they count as never made. An import of 1,000 tasks takes
# a quarter of a second; the longer limit is for requests that can still be seen at work in Label Studio's database.
SETTLE_SECONDS = 3.0
SETTLE_AT_MOST_SECONDS = 120.0
# Label Studio asks its database this often, at the least, while it is at an import.
IDLE_SECONDS = 5


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = cli.parser(__doc__ or "")
    cli.add_task_type(options, required=True)
    cli.add_limit(options, "new tasks")
    cli.add_dry_run(options)
    return options


@dataclass
class Push:
    """What the steps of one push need."""

    settings: Settings
    task_type: TaskType
    project_id: int
    data_factory: Connection
    label_studio_db: Connection
    label_studio: LabelStudio
    run_id: int = 0


def main(options: argparse.Namespace) -> ExitCode:
    """Finish what an earlier push left, then push what waits."""
    settings = load_settings(options.env_file)
    task_type: TaskType = options.task_type
    with (
        connect_data_factory(settings, "push") as data_factory,
        connect(settings, "label_studio_dsn", "push") as label_studio_db,
    ):
        contract.check(label_studio_db)
        project_id = project_id_of(data_factory, settings, task_type)
        label_studio = LabelStudio(settings)
        check_interface(task_type, contract.check_same(label_studio_db, label_studio, project_id))
        push = Push(settings, task_type, project_id, data_factory, label_studio_db, label_studio)
        if options.dry_run:
            reserved = len(reserved_keys(push))
            chosen = choose(push, options.limit)
            reasons = left_out(push, chosen)
            lines = [f"would push {chosen} {task_type.name} tasks to project {project_id}"]
            if reserved:
                lines.append(f"would finish {reserved} tasks of an interrupted push")
            result: dict[str, object] = {"would_push": chosen, "would_recover": reserved, "left_out": reasons}
            cli.print_result(options, result, lines + left_out_lines(reasons))
            return ExitCode.DONE
        with exclusive(data_factory, f"push of {task_type.name}"), recorded_run(data_factory, "push", task_type) as run:
            push.run_id = run.run_id
            recovered, failed = recover(push)
            twins, unclear = remove_twins(push)
            chosen = choose(push, options.limit)
            reasons = left_out(push, chosen)
            pushed = 0
            with cli.progress("push", chosen) as show:
                for keys in push_chosen(push, chosen):
                    made, refused = outcome(push, keys)
                    pushed, failed = pushed + made, failed + refused
                    show(pushed)
            exit_code = ExitCode.PERSON_NEEDED if unclear else ExitCode.PARTIAL if failed else ExitCode.DONE
            run.counts.update(
                pushed=pushed, recovered=recovered, failed=failed, twins_removed=twins, left_out=reasons,
                exit_code=int(exit_code),
            )  # fmt: skip
    result = {**run.counts, "task_type": task_type.name, "project": project_id}
    lines = [f"pushed {pushed} {task_type.name} tasks to project {project_id}"]
    if recovered:
        lines.append(f"finished {recovered} tasks of an interrupted push")
    if twins:
        lines.append(f"removed {twins} tasks that Label Studio made twice")
    if failed:
        lines.append(f"{failed} tasks were refused")
    cli.print_result(options, result, lines + left_out_lines(reasons))
    return exit_code


def check_interface(task_type: TaskType, project: Mapping[str, Any]) -> None:
    """Refuse a project whose labelling interface shows what tasks of this type do not have.

    Label Studio would refuse every single task, although nothing is wrong with the samples.

    Raises:
        SettingError: names the fields.
    """
    shown = set(re.findall(r"""["']\$(\w+)""", project["label_config"]))
    if foreign := sorted(shown - set(task_type.data_fields)):
        raise SettingError(
            f"Label Studio's project {project['id']} shows {', '.join(foreign)}, which {task_type.name} tasks do not "
            f"have: run `make setup-projects`, or name another project in {task_type.project_setting}"
        )


# Choosing and reserving


def choose(push: Push, limit: int | None) -> int:
    """Note in a temporary table which samples to push, in order, and return how many."""
    with push.data_factory.transaction():
        push.data_factory.execute("DROP TABLE IF EXISTS pg_temp.chosen")
        push.data_factory.execute(
            "CREATE TEMPORARY TABLE chosen (position bigint GENERATED ALWAYS AS IDENTITY (MINVALUE 0), sample_id uuid)"
        )
        return push.data_factory.execute(
            sql.SQL(
                """
                INSERT INTO chosen (sample_id)
                SELECT sample_id FROM ({}) AS s WHERE standing = {} ORDER BY priority DESC, arrival LIMIT {}
                """
            ).format(standing(push.task_type), WAITING, limit)
        ).rowcount


def left_out(push: Push, chosen: int) -> dict[str, int]:
    """How many samples do not get a task, by reason."""
    found = {str(reason): int(number) for reason, number in push.data_factory.execute(counts(push.task_type))}
    over_limit = found.pop(WAITING, 0) - chosen
    return {**found, "over the limit": over_limit} if over_limit > 0 else found


def left_out_lines(reasons: dict[str, int]) -> list[str]:
    """The reasons as people read them."""
    return [f"left out: {', '.join(f'{number} {reason}' for reason, number in reasons.items())}"] if reasons else []


def reserve(push: Push, start: int, end: int) -> list[UUID]:
    """Lock the chosen samples of one batch and give each a task key of our own, before anything is sent.

    Samples that were removed or locked since they were chosen are passed over.
    """
    with push.data_factory.transaction():
        # Locking comes first, in a statement of its own: only the next one is sure to see the texts that belong to
        # the version it notes.
        locked = push.data_factory.execute(
            """
            WITH free AS MATERIALIZED (
                SELECT s.sample_id
                FROM samples AS s
                INNER JOIN chosen AS c USING (sample_id)
                WHERE c.position >= %s AND c.position < %s AND s.removed_at IS NULL AND s.locked_by IS NULL
                ORDER BY s.sample_id
                FOR UPDATE OF s
            )
            SELECT free.sample_id FROM free CROSS JOIN LATERAL lock_sample_for_annotation(free.sample_id) AS l
            WHERE l.success
            """,
            [start, end],
        ).fetchall()
        keys = push.data_factory.execute(
            """
            INSERT INTO tasks (sample_id, task_type, project_id, run_id)
            SELECT sample_id, %s, %s, %s FROM unnest(%s::uuid[]) AS sample_id
            RETURNING task_key
            """,
            [push.task_type.name, push.project_id, push.run_id, [sample_id for (sample_id,) in locked]],
        ).fetchall()
        result = [key for (key,) in keys]
        note_showing(push, result)
        return result


def note_showing(push: Push, keys: Sequence[UUID]) -> None:
    """Note that these tasks show what their samples hold now."""
    push.data_factory.execute(
        """
        INSERT INTO task_showings (task_key, sync_version, transcript_version, translation_version, audio_file_md5)
        SELECT t.task_key, s.sync_version, texts.transcript, texts.translation, s.audio_file_md5
        FROM tasks AS t
        INNER JOIN samples AS s USING (sample_id)
        CROSS JOIN LATERAL (
            SELECT
                max(r.version) FILTER (WHERE r.kind = 'transcript') AS transcript,
                max(r.version) FILTER (WHERE r.kind = 'translation') AS translation
            FROM revisions AS r
            WHERE r.sample_id = t.sample_id AND r.withdrawn_at IS NULL
        ) AS texts
        WHERE t.task_key = ANY (%s)
        """,
        [keys],
    )


# Sending and recording


@dataclass
class Sent:
    """Reserved tasks, the first request of which is on its way to Label Studio.

    Attributes:
        keys: what was reserved.
        batch: the tasks of that request.
        imported: their ids, when Label Studio has answered.
        rest: the tasks of the requests that come after it: large ones do not all fit into one.
    """

    keys: Sequence[UUID]
    batch: list[dict[str, Any]]
    imported: Future[list[int]]
    rest: Iterator[list[dict[str, Any]]]


def push_chosen(push: Push, chosen: int) -> Iterator[Sequence[UUID]]:
    """Reserve and import batch after batch; gives the keys of each when it is recorded.

    While Label Studio makes the tasks of one batch, the next one is reserved; there is never more than one request.

    Raises:
        UnavailableError: Label Studio did not answer, twice. What is unclear stays reserved for the next push.
    """
    sent: Sent | None = None
    for start in range(0, chosen, BATCH_TASKS):
        keys = reserve(push, start, start + BATCH_TASKS)
        rest = batches(push, keys)
        batch = next(rest, [])
        if sent:
            finish(push, sent)
            yield sent.keys
        sent = Sent(keys, batch, import_in_background(push, batch), rest)
    if sent:
        finish(push, sent)
        yield sent.keys


def import_in_background(push: Push, batch: Sequence[dict[str, Any]]) -> Future[list[int]]:
    """Begin to import one request's tasks.

    Not an executor: a push that is told to end would wait for its thread, and Label Studio may take minutes.
    """
    imported: Future[list[int]] = Future()

    def work() -> None:
        try:
            imported.set_result(push.label_studio.import_tasks(push.project_id, batch) if batch else [])
        except BaseException as error:
            imported.set_exception(error)

    Thread(target=work, daemon=True).start()
    return imported


def finish(push: Push, sent: Sent) -> None:
    """Import what is left of a batch, and record what each task has become.

    Raises:
        UnavailableError: Label Studio did not answer, twice.
    """
    try:
        record_import(push, sent.batch, sent.imported.result)
        for batch in sent.rest:
            import_batch(push, batch)
    except NoAnswerError as error:
        look_and_import(push, sent.keys, error)


def look_and_import(push: Push, keys: Sequence[UUID], error: NoAnswerError) -> None:
    """After an import without an answer: record the tasks that were made all the same, and import the others."""
    log.warning("%s; looking whether the tasks were made", error)
    record_found(push, keys)
    import_reserved(push, keys)


def import_reserved(push: Push, keys: Sequence[UUID]) -> None:
    """Import those of these tasks that are still reserved, and record what each has become."""
    for batch in batches(push, keys):
        import_batch(push, batch)


def outcome(push: Push, keys: Sequence[UUID]) -> tuple[int, int]:
    """How many of these tasks Label Studio has, and how many it refused."""
    row = push.data_factory.execute(
        """
        SELECT count(*) FILTER (WHERE state NOT IN ('reserved', 'failed')), count(*) FILTER (WHERE state = 'failed')
        FROM tasks WHERE task_key = ANY (%s)
        """,
        [keys],
    ).fetchone()
    return row if row else (0, 0)


def batches(push: Push, keys: Sequence[UUID]) -> Iterator[list[dict[str, Any]]]:
    """The tasks to send for these keys, in requests that are neither too many nor too large."""
    for start in range(0, len(keys), BATCH_TASKS):
        batch: list[dict[str, Any]] = []
        size = 0
        for task in payloads(push, keys[start : start + BATCH_TASKS]):
            bytes_of_task = len(json.dumps(task, ensure_ascii=False).encode())
            if batch and size + bytes_of_task > BATCH_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(task)
            size += bytes_of_task
        if batch:
            yield batch


def payloads(push: Push, keys: Sequence[UUID]) -> list[dict[str, Any]]:
    """What Label Studio is to show for those of these tasks that are still reserved: the texts noted last."""
    rows = push.data_factory.execute(
        """
        SELECT t.task_key, t.sample_id, s.audio_path, transcript.text, translation.text
        FROM tasks AS t
        INNER JOIN samples AS s USING (sample_id)
        INNER JOIN LATERAL (
            SELECT * FROM task_showings AS shown WHERE shown.task_key = t.task_key ORDER BY shown_since DESC LIMIT 1
        ) AS shown ON true
        LEFT JOIN revisions AS transcript
            ON transcript.sample_id = t.sample_id AND transcript.kind = 'transcript'
            AND transcript.version = shown.transcript_version
        LEFT JOIN revisions AS translation
            ON translation.sample_id = t.sample_id AND translation.kind = 'translation'
            AND translation.version = shown.translation_version
        WHERE t.task_key = ANY (%s) AND t.state = 'reserved'
        ORDER BY s.priority DESC, s.arrival
        """,
        [keys],
    ).fetchall()
    result = []
    for key, sample_id, audio_path, transcript, translation in rows:
        fields = {
            "audio": None if audio_path is None else f"{push.settings.audio_server_url}/{quote(audio_path)}",
            "text": transcript,
            "source_text": transcript,
            "translation": translation,
            "sample_id": str(sample_id),
        }
        data = {name: fields[name] for name in push.task_type.data_fields}
        result.append({"data": data, "meta": {contract.KEY: str(key)}})
    return result


def import_batch(push: Push, batch: Sequence[dict[str, Any]]) -> None:
    """Import one request's tasks, and record what each has become."""
    record_import(push, batch, lambda: push.label_studio.import_tasks(push.project_id, batch))


def record_import(push: Push, batch: Sequence[dict[str, Any]], imported: Callable[[], Sequence[int]]) -> None:
    """Record the tasks of one request; where they were refused, find the ones at fault by halves."""
    try:
        task_ids = imported()
    except RefusedError as error:
        if error.status not in (requests.codes.bad_request, requests.codes.request_entity_too_large):
            raise
        if len(batch) == 1:
            refuse(push, batch[0], error.detail)
            return
        middle = len(batch) // 2
        import_batch(push, batch[:middle])
        import_batch(push, batch[middle:])
        return
    record(
        push, {UUID(str(task["meta"][contract.KEY])): task_id for task, task_id in zip(batch, task_ids, strict=True)}
    )


def record(push: Push, task_ids: Mapping[UUID, int]) -> None:
    """Record which Label Studio task each key has become.

    A pull may have been faster, and may even have brought home what was done there: that stays.
    """
    push.data_factory.execute(
        """
        UPDATE tasks AS t
        SET label_studio_task_id = made.task_id, state = 'open', pushed_at = clock_timestamp()
        FROM unnest(%s::uuid[], %s::bigint[]) AS made (task_key, task_id)
        WHERE t.task_key = made.task_key AND t.state = 'reserved'
        """,
        [list(task_ids), list(task_ids.values())],
    )


def refuse(push: Push, task: dict[str, Any], reason: str) -> None:
    """Record that Label Studio does not take a task; it is tried again when its sample has changed."""
    log.error("sample %s: Label Studio refuses the task: %s", task["data"]["sample_id"], reason)
    push.data_factory.execute(
        """
        WITH refused AS (
            UPDATE tasks SET state = 'failed', problem = %s, closed_at = clock_timestamp()
            WHERE task_key = %s
            RETURNING sample_id
        )
        SELECT unlock_sample(sample_id) FROM refused
        """,
        [reason, task["meta"][contract.KEY]],
    )


# Finishing what was interrupted


def reserved_keys(push: Push) -> list[UUID]:
    """Tasks of this type that an earlier push reserved and did not record, whichever project they were meant for."""
    rows = push.data_factory.execute(
        "SELECT task_key FROM tasks WHERE task_type = %s AND state = 'reserved'", [push.task_type.name]
    ).fetchall()
    return [key for (key,) in rows]


def recover(push: Push) -> tuple[int, int]:
    """Finish tasks that an earlier push reserved and did not record; returns how many were made and refused."""
    keys = reserved_keys(push)
    if not keys:
        return 0, 0
    log.info("an earlier push was interrupted: looking for its %s tasks in Label Studio", len(keys))
    record_found(push, keys)
    with push.data_factory.transaction():
        removed = push.data_factory.execute(
            """
            WITH removed AS (
                UPDATE tasks AS t
                SET
                    state = 'failed', closed_at = clock_timestamp(),
                    problem = 'its sample was removed before the task was made'
                FROM samples AS s
                WHERE t.task_key = ANY (%s) AND t.state = 'reserved'
                    AND s.sample_id = t.sample_id AND s.removed_at IS NOT NULL
                RETURNING t.task_key, t.sample_id
            )
            SELECT task_key, unlock_sample(sample_id) FROM removed
            """,
            [keys],
        ).fetchall()
        missing = push.data_factory.execute(
            """
            UPDATE tasks SET project_id = %s WHERE task_key = ANY (%s) AND state = 'reserved'
            RETURNING task_key
            """,
            [push.project_id, keys],
        ).fetchall()
        # They were never made, so nobody saw what was noted then; what they will show is what is true now.
        note_showing(push, [key for (key,) in missing])
    again = [key for (key,) in missing]
    try:
        import_reserved(push, again)
    except NoAnswerError as error:
        look_and_import(push, again, error)
    return outcome(push, list(set(keys) - {key for key, _unlocked in removed}))


def record_found(push: Push, keys: Sequence[UUID]) -> None:
    """Record those of these tasks that Label Studio has made, after an import that was cut off.

    Label Studio carries an import out even when nobody waits for its answer any more. So this looks until all are
    there, or until every request that was at work when it began has ended.
    """
    row = push.data_factory.execute(
        """
        SELECT coalesce(max(t.label_studio_task_id), 0)
        FROM tasks AS t
        WHERE t.pushed_at < (SELECT min(r.reserved_at) FROM tasks AS r WHERE r.task_key = ANY (%s))
        """,
        [keys],
    ).fetchone()
    made_before = row[0] if row else 0
    began = time.monotonic()
    (began_at,) = push.label_studio_db.execute("SELECT clock_timestamp()").fetchone() or (None,)
    while True:
        # Whether requests are at work is asked before the tasks are: one that ends in between is seen. Label Studio
        # opens a connection for each request, as its tables' owner; one that idles for long is somebody's.
        (working,) = push.label_studio_db.execute(
            """
            SELECT EXISTS (
                SELECT FROM pg_stat_activity
                WHERE datname = current_database() AND backend_start < %s
                    AND usesysid = (SELECT relowner FROM pg_class WHERE oid = 'task'::regclass)
                    AND (state <> 'idle' OR state_change > clock_timestamp() - make_interval(secs => %s))
            )
            """,
            [began_at, IDLE_SECONDS],
        ).fetchone() or (True,)
        found = push.label_studio_db.execute(
            """
            SELECT meta ->> %(key)s, min(id) FROM task
            WHERE id > %(after)s AND meta ->> %(key)s = ANY (%(keys)s)
            GROUP BY 1
            """,
            {"key": contract.KEY, "after": made_before, "keys": [str(key) for key in keys]},
        ).fetchall()
        waited = time.monotonic() - began
        if len(found) == len(keys) or waited > SETTLE_AT_MOST_SECONDS or (waited > SETTLE_SECONDS and not working):
            break
        time.sleep(0.1)
    record(push, {UUID(key): task_id for key, task_id in found})


def remove_twins(push: Push) -> tuple[int, int]:
    """Delete tasks that Label Studio made twice; returns how many, and how many pairs are unclear.

    The last line of defence: an import that was still queued when its tasks were looked for makes them a second time.
    Of such a pair the one that somebody has touched is kept; where both were touched a person must decide.
    """
    row = push.data_factory.execute(
        """
        SELECT coalesce(max(label_studio_task_id), 0) FROM tasks
        WHERE project_id = %s AND pushed_at < clock_timestamp() - interval '1 day'
        """,
        [push.project_id],
    ).fetchone()
    recent = push.label_studio_db.execute(
        """
        SELECT
            t.id, t.meta ->> %(key)s,
            t.total_annotations + t.cancelled_annotations > 0
            OR EXISTS (SELECT FROM tasks_annotationdraft AS d WHERE d.task_id = t.id)
            OR EXISTS (SELECT FROM tasks_tasklock AS l WHERE l.task_id = t.id AND l.expire_at > now())
        FROM task AS t
        INNER JOIN (
            SELECT meta ->> %(key)s AS key FROM task
            WHERE project_id = %(project)s AND id > %(after)s AND meta ? %(key)s
            GROUP BY 1 HAVING count(*) > 1
        ) AS twice ON twice.key = t.meta ->> %(key)s
        WHERE t.project_id = %(project)s AND t.id > %(after)s
        ORDER BY t.id
        """,
        {"key": contract.KEY, "project": push.project_id, "after": row[0] if row else 0},
    ).fetchall()
    pairs: dict[str, list[tuple[int, bool]]] = {}
    for task_id, key, touched in recent:
        pairs.setdefault(key, []).append((task_id, touched))
    ours = push.data_factory.execute(
        "SELECT task_key::text FROM tasks WHERE task_key::text = ANY (%s)", [list(pairs)]
    ).fetchall()
    surplus: list[int] = []
    kept: dict[str, int] = {}
    unclear = 0
    for (key,) in ours:
        touched_ids = [task_id for task_id, touched in pairs[key] if touched]
        if len(touched_ids) > 1:
            log.error("tasks %s in Label Studio are one and the same: delete all but one", touched_ids)
            unclear += 1
            continue
        kept[key] = (touched_ids or [pairs[key][0][0]])[0]
        surplus.extend(task_id for task_id, _touched in pairs[key] if task_id != kept[key])
    if surplus:
        log.warning("Label Studio made %s tasks twice: deleting the untouched ones", len(surplus))
        # First the ledger: a task that it names must not be missing, or its sample would be pushed again.
        push.data_factory.execute(
            """
            UPDATE tasks AS t SET label_studio_task_id = kept.task_id
            FROM unnest(%s::uuid[], %s::bigint[]) AS kept (task_key, task_id)
            WHERE t.task_key = kept.task_key AND t.label_studio_task_id <> kept.task_id
            """,
            [list(kept), list(kept.values())],
        )
        push.label_studio.delete_tasks(push.project_id, surplus)
    return len(surplus), unclear


if __name__ == "__main__":
    cli.run(parser(), main)
