#!/usr/bin/env python3
"""Write reviewed samples for training: one folder for each sample and kind of review."""

import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from psycopg.rows import class_row

from manifest import SCHEMA_VERSION, add_output_dir, output_folder, write_manifest
from station import cli
from station.cli import log
from station.database import Connection, Run, connect_data_factory, exclusive, recorded_run
from station.errors import ExitCode, SettingError
from station.files import (
    UNFINISHED,
    flush_file_system,
    flush_names,
    json_document,
    json_text,
    put_folder,
    write_file,
    writing_to,
)
from station.settings import Settings, load_settings
from station.task_types import TASK_TYPES, TaskType

# A batch is what is in memory, what one flush of the file system covers, and what one transaction records.
BATCH_SAMPLES = 500
_SAMPLE_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_FAILURES_IN_RESULT = 100
_THREADS = 2

# linux/fs.h
_FICLONE = 0x40049409
_OUTPUT_IS_AT_FAULT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

HELD_BACK = {
    "conflict": "open conflict",
    "removed": "removed by the crawler",
    "audio_changed": "audio changed since the review",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = cli.parser(
        "Write what people reviewed to <output>/<task type's folder>/<sample id>/: audio, text, metadata.json.\n"
        "A sample is written when its review is new or was corrected; one whose review was withdrawn is removed.\n"
        "Folders appear whole. Then write manifest.jsonl and manifest.json."
    )
    cli.add_task_type(options, required=False)
    cli.add_limit(options, "samples")
    add_output_dir(options)
    options.add_argument("--include-exported", action="store_true", help="write also what has not changed")
    options.add_argument("--no-manifest", action="store_true", help="leave the manifest as it is")
    cli.add_dry_run(options)
    return options


class Place:
    """Where the folders of one task type lie.

    Attributes:
        folder: holds the finished folders.
        staging: beside them those that are being written or removed; all in it belongs to a run that has not ended,
            or was killed.
    """

    def __init__(self, task_type: TaskType, output: Path) -> None:
        """Name the folders; none is made."""
        self.task_type = task_type
        self.folder = output / task_type.folder
        self.staging = self.folder / f"{UNFINISHED}export"

    def open(self) -> None:
        """Begin with nothing unfinished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.close()
        self.staging.mkdir()

    def close(self) -> None:
        """Remove what is unfinished."""
        if self.staging.exists():
            shutil.rmtree(self.staging)

    def discard(self, sample_id: str) -> None:
        """Remove a sample's folder that failed or has been replaced."""
        unfinished = self.staging / sample_id
        if unfinished.exists():
            shutil.rmtree(unfinished)


@dataclass(frozen=True)
class Review:
    """What is to be written for one sample and task type.

    Attributes are columns; `shown_*` is the transcript whose translation was reviewed.
    """

    task_type: str
    sample_id: str
    position: int
    revision_id: int
    audio_path: str | None
    audio_file_md5: str | None
    audio_size_bytes: int | None
    audio_modified_ns: int | None
    external_id: str
    source_type: str
    duration_seconds: float | None
    language_tags: list[str]
    captured_at: date | None
    url: str | None
    title: str | None
    channel_id: str | None
    upload_date: date | None
    acoustic_meta: Any
    subtitle_type: str | None
    transcript_language: str | None
    cs_ratio: float | None
    metadata: Any
    dvc_commit_hash: str | None
    parent_sample_id: str | None
    version: int
    sync_version: int
    source: str
    created_at: datetime
    text: str | None
    segments: Any
    language: str | None
    annotator: str | None
    shown_text: str | None
    shown_language: str | None


@dataclass(frozen=True)
class Plan:
    """What is to be done; the rows are in the temporary table `plan`.

    Attributes:
        samples: how many samples have something to export; their `position` counts from 1 to this.
        result: the result of a run in which nothing fails. It counts folders, but `left` counts samples.
    """

    samples: int
    result: dict[str, Any]


class SampleError(Exception):
    """One sample cannot be written; the others can."""


def main(options: argparse.Namespace) -> ExitCode:
    """Plan, remove what was withdrawn, write what is new, write the manifest."""
    settings = load_settings(options.env_file)
    output = output_folder(options, settings)
    task_types = [options.task_type] if options.task_type else list(TASK_TYPES.values())
    places = {task_type.name: Place(task_type, output) for task_type in task_types}
    with connect_data_factory(settings, "export") as connection:
        if options.dry_run:
            with writing_to(output):
                result = _plan(connection, output, places, options).result
        else:
            with (
                exclusive(connection, f"export to {output}"),
                recorded_run(connection, "export", options.task_type) as run,
            ):
                result = _export(connection, settings, output, places, options, run)
    _print(options, output, result)
    return ExitCode.PARTIAL if result["failed"] else ExitCode.DONE


def _export(
    connection: Connection,
    settings: Settings,
    output: Path,
    places: dict[str, Place],
    options: argparse.Namespace,
    run: Run,
) -> dict[str, Any]:
    with writing_to(output):
        for place in places.values():
            place.open()
        plan = _plan(connection, output, places, options)
        try:
            _withdraw(connection, output, places)
            limit = options.limit or sys.maxsize
            written = Writer(connection, settings.raw_dir, output, places, plan, limit, run).write()
        finally:
            for place in places.values():
                place.close()
    result = {**plan.result, **written}
    if not options.no_manifest:
        result["manifest"] = "written" if write_manifest(connection, output) else "unchanged"
    run.counts.update(result, exit_code=ExitCode.PARTIAL if result["failed"] else ExitCode.DONE)
    return result


def _plan(connection: Connection, output: Path, places: dict[str, Place], options: argparse.Namespace) -> Plan:
    """Decide about every sample and task type, in the temporary table `plan`."""
    connection.execute("CREATE TEMP TABLE folders (task_type task_type NOT NULL, sample_id uuid NOT NULL)")
    with connection.cursor().copy("COPY folders FROM STDIN") as copy:
        for place in places.values():
            for name in _folder_names(place.folder):
                copy.write_row((place.task_type.name, name))
    connection.execute(
        """
        CREATE TEMP TABLE plan AS
        WITH reviewed AS (
            -- A revision without an annotation is nobody's review: texts that the crawler brought, or that a
            -- conflict sample was made with. What annotators made of hidden gold is measured, not used.
            SELECT DISTINCT ON (wanted.task_type, r.sample_id)
                wanted.task_type, r.sample_id, r.revision_id, r.audio_file_md5
            FROM unnest(%(task_types)s::task_type[], %(kinds)s::revision_kind[]) AS wanted (task_type, kind)
            INNER JOIN revisions AS r USING (kind)
            INNER JOIN submitted_annotations AS a USING (annotation_id)
            INNER JOIN tasks AS t USING (task_key)
            WHERE r.source IN ('human', 'resolution') AND r.withdrawn_at IS NULL AND t.gold_id IS NULL
            ORDER BY wanted.task_type, r.sample_id, r.version DESC
        ),
        written AS (
            -- A row without its folder is not written, and a folder without its row was left by a killed run.
            SELECT
                task_type, sample_id, e.revision_id, e.audio_file_md5,
                e.revision_id IS NOT NULL AND f.sample_id IS NOT NULL AS is_whole
            FROM (
                SELECT * FROM exports
                WHERE destination = %(destination)s AND task_type = ANY (%(task_types)s::task_type[])
            ) AS e
            FULL JOIN folders AS f USING (task_type, sample_id)
        ),
        decided AS (
            SELECT
                task_type, sample_id, s.arrival, r.revision_id, s.audio_path, r.audio_file_md5,
                s.audio_size_bytes, s.audio_modified_ns,
                CASE
                    WHEN c.sample_id IS NOT NULL THEN 'conflict'
                    WHEN r.revision_id IS NULL THEN 'withdraw'
                    WHEN s.removed_at IS NOT NULL THEN 'removed'
                    WHEN r.audio_file_md5 IS DISTINCT FROM s.audio_file_md5 THEN 'audio_changed'
                    WHEN w.is_whole AND w.revision_id = r.revision_id
                        AND w.audio_file_md5 IS NOT DISTINCT FROM r.audio_file_md5
                        AND NOT %(include_exported)s THEN 'up_to_date'
                    ELSE 'export'
                END AS action
            FROM reviewed AS r
            FULL JOIN written AS w USING (task_type, sample_id)
            LEFT JOIN (SELECT DISTINCT task_type, sample_id FROM tasks WHERE state = 'conflict') AS c
                USING (task_type, sample_id)
            -- A folder named for a sample that this database does not know is not ours.
            INNER JOIN samples AS s USING (sample_id)
        )
        SELECT *, dense_rank() OVER (PARTITION BY action ORDER BY arrival) AS position FROM decided
        """,
        {
            "task_types": list(places),
            "kinds": [place.task_type.revision_kind for place in places.values()],
            "destination": str(output),
            "include_exported": options.include_exported,
        },
    )
    connection.execute("CREATE INDEX ON plan (action, position)")
    connection.execute(
        "CREATE TEMP TABLE written (task_type task_type, sample_id uuid, revision_id bigint, audio_file_md5 text, "
        "entry jsonb) ON COMMIT DELETE ROWS"
    )
    connection.execute("ANALYZE plan")
    rows = connection.execute(
        """
        SELECT action, count(*) FILTER (WHERE action <> 'export' OR position <= %(limit)s), max(position)
        FROM plan
        GROUP BY action
        """,
        {"limit": options.limit or sys.maxsize},
    ).fetchall()
    folders = {action: count for action, count, _samples in rows}
    samples = {action: count for action, _folders, count in rows}.get("export", 0)
    return Plan(
        samples=samples,
        result={
            "exported": folders.get("export", 0),
            "up_to_date": folders.get("up_to_date", 0),
            "held_back": {reason: folders[reason] for reason in HELD_BACK if reason in folders},
            "withdrawn": folders.get("withdraw", 0),
            "failed": 0,
            "left": max(0, samples - (options.limit or samples)),
            "failures": [],
            "manifest": None,
        },
    )


def _folder_names(folder: Path) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if _SAMPLE_ID.fullmatch(entry.name):
                    yield entry.name
    except FileNotFoundError:
        return


def _withdraw(connection: Connection, output: Path, places: dict[str, Place]) -> None:
    """Remove the folders whose review was withdrawn: out of sight first, then their rows, then from disk."""
    position = 0
    while rows := _withdrawn(connection, position + 1, position + BATCH_SAMPLES):
        position += BATCH_SAMPLES
        for name, sample_id in rows:
            log.debug("withdrawing %s %s", name, sample_id)
            with contextlib.suppress(FileNotFoundError):
                (places[name].folder / sample_id).rename(places[name].staging / sample_id)
        for name in {name for name, _sample_id in rows}:
            flush_names(places[name].folder)
        connection.execute(
            """
            DELETE FROM exports
            USING unnest(%s::task_type[], %s::uuid[]) AS gone (task_type, sample_id)
            WHERE exports.destination = %s
                AND exports.task_type = gone.task_type AND exports.sample_id = gone.sample_id
            """,
            [[row[0] for row in rows], [row[1] for row in rows], str(output)],
        )
        for name, sample_id in rows:
            places[name].discard(sample_id)


def _withdrawn(connection: Connection, first: int, last: int) -> list[tuple[str, str]]:
    rows = connection.execute(
        """
        SELECT task_type::text, sample_id::text
        FROM plan
        WHERE action = 'withdraw' AND position BETWEEN %s AND %s
        ORDER BY position, task_type
        """,
        [first, last],
    ).fetchall()
    return [(name, sample_id) for name, sample_id in rows]


@dataclass(frozen=True)
class Batch:
    """Samples whose folders are being built by the pool's threads."""

    reviews: list[Review]
    parts: list[Future[list[str | SampleError]]]

    @property
    def samples(self) -> int:
        """How many samples it has; one may have a review of each task type."""
        return len({review.position for review in self.reviews})


@dataclass
class Writer:
    """Writes batch after batch until all are written, or as many samples as the limit says.

    A sample that fails does not count towards the limit: otherwise a few broken ones would stop all progress. While
    one batch is flushed, renamed and recorded, the next one is built.
    """

    connection: Connection
    raw: Path
    output: Path
    places: dict[str, Place]
    plan: Plan
    limit: int
    run: Run
    begun: int = 0
    samples_written: int = 0
    exported: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)

    def write(self) -> dict[str, Any]:
        """Do it all; returns what the plan could not know."""
        with (
            cli.progress("export", min(self.plan.samples, self.limit)) as show,
            ThreadPoolExecutor(_THREADS) as pool,
        ):
            batch = self._begin(pool, 0)
            while batch:
                following = self._begin(pool, batch.samples)
                self._finish(batch)
                show(self.samples_written)
                batch = following or self._begin(pool, 0)
        return {
            "exported": self.exported,
            "failed": self.failed,
            "failures": self.failures,
            "left": self.plan.samples - self.begun,
        }

    def _begin(self, pool: ThreadPoolExecutor, samples_under_way: int) -> Batch | None:
        """Have the next batch built; None if there is none, or the limit may be reached without it."""
        size = min(BATCH_SAMPLES, self.plan.samples - self.begun, self.limit - self.samples_written - samples_under_way)
        if size <= 0:
            return None
        reviews = _reviews(self.connection, self.begun + 1, self.begun + size)
        self.begun += size
        if not self.raw.is_dir() and any(review.audio_path for review in reviews):
            raise SettingError(f"RAW_DIR: there is no folder {self.raw.resolve()}: it holds the audio")
        share = math.ceil(len(reviews) / _THREADS)
        return Batch(
            reviews,
            [
                pool.submit(_build_each, self.raw, self.places, reviews[start : start + share])
                for start in range(0, len(reviews), share)
            ],
        )

    def _finish(self, batch: Batch) -> None:
        """Bring a batch into its place: the files first, then their rows, all in one transaction."""
        built: list[tuple[Review, str]] = []
        for review, outcome in zip(batch.reviews, chain.from_iterable(p.result() for p in batch.parts), strict=True):
            if isinstance(outcome, str):
                built.append((review, outcome))
            else:
                self._fail(review, outcome)
        flush_file_system(self.output)
        for review, _entry in built:
            log.debug("exporting %s %s", review.task_type, review.external_id)
            place = self.places[review.task_type]
            put_folder(place.staging / review.sample_id, place.folder / review.sample_id)
        for name in {review.task_type for review, _entry in built}:
            flush_names(self.places[name].folder)
        _record(self.connection, self.output, built, self.run)
        for review in batch.reviews:
            self.places[review.task_type].discard(review.sample_id)
        self.exported += len(built)
        self.samples_written += len({review.position for review, _entry in built})

    def _fail(self, review: Review, error: SampleError) -> None:
        failure = f"{review.task_type} {review.external_id}: {error}"
        log.error("%s", failure)
        self.failed += 1
        if len(self.failures) < _FAILURES_IN_RESULT:
            self.failures.append(failure)


def _reviews(connection: Connection, first: int, last: int) -> list[Review]:
    with connection.cursor(row_factory=class_row(Review)) as cursor:
        cursor.execute(
            """
            SELECT
                p.task_type::text, p.sample_id::text, p.position, p.revision_id,
                -- As planned: were they of another moment than the md5, another file could pass for the right one.
                p.audio_path, p.audio_file_md5, p.audio_size_bytes, p.audio_modified_ns,
                s.external_id, s.source_type, s.duration_seconds, s.language_tags, s.captured_at, s.url, s.title,
                s.channel_id, s.upload_date, s.acoustic_meta, s.subtitle_type, s.transcript_language, s.cs_ratio,
                s.metadata, s.dvc_commit_hash, s.parent_sample_id::text,
                r.version, r.sync_version, r.source::text, r.created_at, r.text, r.segments, r.language,
                w.pseudonym AS annotator,
                shown.text AS shown_text, shown.language AS shown_language
            FROM plan AS p
            INNER JOIN samples AS s USING (sample_id)
            INNER JOIN revisions AS r USING (revision_id)
            INNER JOIN submitted_annotations AS a USING (annotation_id)
            LEFT JOIN annotators AS w USING (annotator_id)
            LEFT JOIN LATERAL (
                SELECT h.transcript_version
                FROM task_showings AS h
                WHERE h.task_key = a.task_key AND h.shown_since <= a.began_at
                ORDER BY h.shown_since DESC
                LIMIT 1
            ) AS showing ON p.task_type = 'translation_review'
            -- The transcript that was translated, not one that came later.
            LEFT JOIN LATERAL (
                SELECT x.text, x.language
                FROM revisions AS x
                WHERE x.sample_id = p.sample_id AND x.kind = 'transcript'
                    AND CASE
                        WHEN showing.transcript_version IS NOT NULL THEN x.version = showing.transcript_version
                        ELSE x.sync_version <= r.sync_version
                            AND (x.withdrawn_at IS NULL OR x.withdrawn_at > r.created_at)
                    END
                ORDER BY x.version DESC
                LIMIT 1
            ) AS shown ON p.task_type = 'translation_review'
            WHERE p.action = 'export' AND p.position BETWEEN %s AND %s
            ORDER BY p.position, p.task_type
            """,
            [first, last],
        )
        return cursor.fetchall()


def _record(connection: Connection, output: Path, built: Sequence[tuple[Review, str]], run: Run) -> None:
    with connection.transaction():
        with connection.cursor().copy("COPY written FROM STDIN") as copy:
            for review, entry in built:
                copy.write_row((review.task_type, review.sample_id, review.revision_id, review.audio_file_md5, entry))
        connection.execute(
            """
            INSERT INTO exports (destination, task_type, sample_id, revision_id, audio_file_md5, entry, run_id)
            SELECT %s, task_type, sample_id, revision_id, audio_file_md5, entry, %s
            FROM written
            ON CONFLICT (destination, task_type, sample_id) DO UPDATE SET
                revision_id = excluded.revision_id,
                audio_file_md5 = excluded.audio_file_md5,
                entry = excluded.entry,
                exported_at = excluded.exported_at,
                run_id = excluded.run_id
            """,
            [str(output), run.run_id],
        )


def _build_each(raw: Path, places: dict[str, Place], reviews: Sequence[Review]) -> list[str | SampleError]:
    """Build the folders of some reviews; for each its line in the manifest, or why it failed."""
    outcomes: list[str | SampleError] = []
    for review in reviews:
        try:
            outcomes.append(_build(raw, places[review.task_type], review))
        except SampleError as error:
            outcomes.append(error)
        except ValueError as error:
            outcomes.append(SampleError(f"cannot be written as JSON: {error}"))
    return outcomes


def _build(raw: Path, place: Place, review: Review) -> str:
    """Write a sample's folder where no reader looks.

    Returns:
        the sample's line in the manifest, as JSON.

    Raises:
        SampleError: the audio is not there, or not the one that was reviewed.
        ValueError: JSON cannot hold it.
    """
    folder = place.staging / review.sample_id
    folder.mkdir()
    files: dict[str, int] = {}
    audio_file = None
    if review.audio_path is not None:
        audio_file = f"audio{Path(review.audio_path).suffix.lower()}"
        files[audio_file] = _place_audio(raw / review.audio_path, folder / audio_file, review)
    document = _document(review)
    for name, content in (
        (place.task_type.document, json_document(document)),
        ("metadata.json", json_document(_metadata(review, audio_file))),
    ):
        write_file(folder / name, content)
        files[name] = len(content)
    return json_text(_entry(review, place, document, files))


def _place_audio(source: Path, target: Path, review: Review) -> int:
    """Put a sample's audio into its folder.

    A clone shares blocks with the raw file until either changes. A hard link is one file under two names: whoever
    rewrites one in place (cp, sox, ffmpeg -y) rewrites the other. So only a file that nobody may write, as DVC
    leaves what it links from its cache, is hard-linked; where neither is possible the audio is copied.

    Returns:
        its size in bytes.

    Raises:
        SampleError: it is not there, or not the one that was reviewed.
    """
    try:
        # Opening a pipe would otherwise wait for a writer.
        descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise SampleError(f"cannot read {source}: {error.strerror}: bring the audio back, then export again") from None
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise SampleError(f"{source} is not a file")
        if (found.st_size, found.st_mtime_ns) != (review.audio_size_bytes, review.audio_modified_ns):
            md5 = hashlib.file_digest(file, functools.partial(hashlib.md5, usedforsecurity=False)).hexdigest()
            if md5 != review.audio_file_md5:
                raise SampleError(
                    f"{source} is not the audio that was reviewed: its md5 is {md5}, not {review.audio_file_md5}: "
                    "run ingest, or bring the right file back"
                )
        if not _hard_link(source, target, found):
            with target.open("xb", buffering=0) as copy:
                _clone_or_copy(source, file.fileno(), copy.fileno(), found)
    return found.st_size


def _hard_link(source: Path, target: Path, found: os.stat_result) -> bool:
    """Link a write-protected file; says whether that was possible."""
    if found.st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
        return False
    try:
        # link(2) would link a symbolic link itself.
        os.link(source.resolve() if source.is_symlink() else source, target)
    except OSError:
        return False
    if os.path.samestat(found, target.stat()):
        return True
    # The file was replaced after it was checked.
    target.unlink()
    return False


def _clone_or_copy(source: Path, descriptor: int, copy: int, found: os.stat_result) -> None:
    try:
        fcntl.ioctl(copy, _FICLONE, descriptor)
    except OSError:
        copied = 0
        try:
            while sent := os.sendfile(copy, descriptor, copied, found.st_size - copied + 1):
                copied += sent
        except OSError as error:
            if error.errno in _OUTPUT_IS_AT_FAULT:
                raise
            raise SampleError(f"cannot copy {source}: {error.strerror}") from None
    now = os.fstat(descriptor)
    if (now.st_size, now.st_mtime_ns) != (found.st_size, found.st_mtime_ns):
        raise SampleError(f"{source} changed while it was copied: export again")


def _document(review: Review) -> dict[str, object]:
    """The reviewed text, in the shape of the crawler's text files (segmentation has no counterpart there)."""
    segments = review.segments or []
    revision = _revision(review)
    if review.task_type == "audio_segmentation":
        language = review.language or review.transcript_language
        return {"sample_id": review.sample_id, "language": language, "segments": segments, "revision": revision}
    if review.task_type == "translation_review":
        return {
            "sample_id": review.sample_id,
            "language": review.shown_language or review.transcript_language,
            "target_language": review.language,
            "source_text": review.shown_text,
            "full_text": review.text,
            "segments": segments,
            "revision": revision,
        }
    return {
        "sample_id": review.sample_id,
        "language": review.language or review.transcript_language,
        "full_text": review.text,
        "segments": segments,
        "revision": revision,
    }


def _revision(review: Review) -> dict[str, object]:
    return {"version": review.version, "source": review.source, "created_at": review.created_at.isoformat()}


def _metadata(review: Review, audio_file: str | None) -> dict[str, object]:
    """Where the sample and its review come from. Nothing of this run: the same content gives the same bytes."""
    return {
        "schema_version": SCHEMA_VERSION,
        "task_type": review.task_type,
        "sample_id": review.sample_id,
        "external_id": review.external_id,
        "audio_file": audio_file,
        "audio_file_md5": review.audio_file_md5,
        "duration_seconds": review.duration_seconds,
        "acoustic_meta": review.acoustic_meta,
        "language_tags": review.language_tags,
        "cs_ratio": review.cs_ratio,
        "revision": _revision(review),
        "annotator": review.annotator,
        "sync_version": review.sync_version,
        "dvc_commit_hash": review.dvc_commit_hash,
        "source": {
            "type": review.source_type,
            "file_path": review.audio_path,
            "url": review.url,
            "title": review.title,
            "channel_id": review.channel_id,
            "upload_date": review.upload_date.isoformat() if review.upload_date else None,
            "captured_at": review.captured_at.isoformat() if review.captured_at else None,
            "subtitle_type": review.subtitle_type,
            "transcript_language": review.transcript_language,
            "parent_sample_id": review.parent_sample_id,
            "metadata": review.metadata,
        },
    }


def _entry(review: Review, place: Place, document: dict[str, object], files: dict[str, int]) -> dict[str, object]:
    """The sample's line in the manifest."""
    names = {"full_text": "text"}
    if review.task_type == "translation_review":
        names = {"source_text": "source_text", "full_text": "translation", "target_language": "target_language"}
    elif review.task_type == "audio_segmentation":
        names = {"segments": "segments"}
    return {
        "task_type": review.task_type,
        "sample_id": review.sample_id,
        "external_id": review.external_id,
        "folder": f"{place.task_type.folder}/{review.sample_id}",
        "files": files,
        "duration_seconds": review.duration_seconds,
        "language_tags": review.language_tags,
        "language": document["language"],
        **{name: document[key] for key, name in names.items()},
        "revision": document["revision"],
        "annotator": review.annotator,
        "audio_file_md5": review.audio_file_md5,
        "dvc_commit_hash": review.dvc_commit_hash,
    }


def _print(options: argparse.Namespace, output: Path, result: dict[str, Any]) -> None:
    would = "would be " if options.dry_run else ""
    held_back = ", ".join(f"{HELD_BACK[reason]} {count}" for reason, count in result["held_back"].items())
    lines = [
        f"{would}exported: {result['exported']}",
        f"up to date: {result['up_to_date']}",
        f"held back: {sum(result['held_back'].values())}" + (f" ({held_back})" if held_back else ""),
        f"{would}withdrawn: {result['withdrawn']}",
        f"failed: {result['failed']}",
    ]
    if result["left"]:
        lines.append(f"left for another run, because of --limit: {result['left']}")
    if result["manifest"]:
        lines.append(f"manifest: {result['manifest']}")
    cli.print_result(
        options, {"dry_run": options.dry_run, "destination": str(output), **result}, [*lines, f"in: {output}"]
    )


if __name__ == "__main__":
    cli.run(parser(), main)
