#!/usr/bin/env python3
"""Measure each step beside what one would otherwise run, in the same run on the same machine.

Prints a table with ratios and peak memory, and writes .local/bench/results.json. Everything happens in .local/bench,
on a PostgreSQL that flushes to disk and a real Label Studio. Nothing is asserted: numbers depend on the machine.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import psycopg
import requests
from rich.console import Console
from rich.table import Table

from big_corpus import write_corpus
from station.contract import KEY
from station.local_services import PROJECT, LocalPostgres, free_port, initialise_label_studio, label_studio

FOLDER = PROJECT / ".local" / "bench"
RAW, REVIEWED = FOLDER / "raw", FOLDER / "reviewed"
Connection = psycopg.Connection[tuple[Any, ...]]


@dataclass
class Measure:
    """One way of doing something.

    Attributes:
        step: what is done.
        way: how.
        items: how many.
        seconds: wall-clock time.
        peak_mib: peak memory of the process, where it was measured.
        ratio: how many times as fast labelstation is, per item, where this is another way.
    """

    step: str
    way: str
    items: int
    seconds: float
    peak_mib: float | None = None
    ratio: str = ""


class Bench:
    """Servers, settings and results of one run."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Start from an empty folder."""
        self.options = options
        self.results: list[Measure] = []
        shutil.rmtree(FOLDER, ignore_errors=True)
        self.postgres = LocalPostgres(FOLDER / "postgres")
        self.postgres.start()
        account = initialise_label_studio(FOLDER / "label_studio", self.postgres)
        self.server = label_studio(FOLDER / "label_studio", self.postgres, free_port())
        self.server.start()
        self.headers = {"Authorization": f"Token {account.token}"}
        self.env_file = FOLDER / "station.env"
        settings = {
            "LABEL_STUDIO_URL": self.server.address,
            "LABEL_STUDIO_API_KEY": account.token,
            "DATA_FACTORY_DSN": self.postgres.dsn("labelstation", "data_factory"),
            "DATA_FACTORY_OWNER_DSN": self.postgres.dsn("labelstation_owner", "data_factory"),
            "LABEL_STUDIO_DSN": self.postgres.dsn("label_studio_reader", "label_studio"),
            "LABEL_STUDIO_OWNER_DSN": self.postgres.dsn("label_studio", "label_studio"),
            "RAW_DIR": RAW,
            "REVIEWED_DIR": REVIEWED,
        }
        self.env_file.write_text("".join(f"{name}='{value}'\n" for name, value in settings.items()))
        self.script("migrate")
        made = self.script("setup_projects", "--json")[2]
        self.project = int(json.loads(made)["transcript_correction"]["project"])

    def stop(self) -> None:
        """Stop the servers and throw their data away."""
        self.server.stop()
        self.postgres.stop("immediate")
        for place in FOLDER.iterdir():
            if place.is_dir():
                shutil.rmtree(place)

    def script(self, name: str, *arguments: str) -> tuple[float, float, str]:
        """Run one of the scripts; returns seconds, peak MiB, and what it printed."""
        command = [
            sys.executable,
            str(PROJECT / "scripts" / f"{name}.py"),
            "--env-file",
            str(self.env_file),
            *arguments,
        ]
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            # Not ru_maxrss: that begins with the memory of this process, which the child shares until its exec.
            peak = 0.0
            while child.poll() is None:
                peak = max(peak, _peak_mib(child.pid))
                time.sleep(0.01)
            printed = child.stdout.read()
        seconds = time.perf_counter() - began
        if child.returncode != 0:
            raise SystemExit(f"{name} ended with {child.returncode}")
        return seconds, peak, printed

    def note(self, step: str, way: str, items: int, seconds: float, peak_mib: float | None = None) -> Measure:
        """Keep one measure and say it."""
        measure = Measure(step, way, items, round(seconds, 3), peak_mib and round(peak_mib))
        self.results.append(measure)
        print(f"{step}: {way}: {items} in {seconds:.2f} s", file=sys.stderr, flush=True)
        return measure

    @contextmanager
    def database(self, name: str, role: str = "postgres") -> Iterator[Connection]:
        """A connection of the benchmark's own."""
        with psycopg.connect(self.postgres.dsn(role, name), autocommit=True) as connection:
            yield connection

    def empty(self) -> None:
        """Forget all samples and tasks, here and in Label Studio."""
        with self.database("data_factory") as connection:
            connection.execute("TRUNCATE samples, tasks, runs, pull_cursors, annotators CASCADE")
        with self.database("label_studio") as connection:
            connection.execute("TRUNCATE task, task_completion CASCADE")


def _peak_mib(pid: int) -> float:
    """The most memory that a process has had resident since its exec; 0 if it has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def timed(work: Callable[[], object]) -> float:
    """Seconds that something takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(ours: Measure, other: Measure) -> None:
    """Note how many times as fast ours is as another way, per item."""
    ratio = (other.seconds / other.items) / (ours.seconds / ours.items)
    other.ratio = f"{ratio:.{0 if ratio >= 10 else 2}f} x"


# Ingest


def bench_ingest(bench: Bench) -> None:
    """A large corpus, beside row-by-row inserts of its first lines."""
    lines, some = bench.options.lines, bench.options.rows
    shutil.rmtree(RAW, ignore_errors=True)
    write_corpus(RAW, lines)
    rows = bench.note("ingest", "row by row, a commit each", some, timed(lambda: insert_row_by_row(bench, some)))
    bench.empty()
    few = RAW.with_name("raw-tenth")
    write_corpus(few, lines // 10)
    seconds, peak, _ = bench.script("ingest", str(few))
    bench.note("ingest", "labelstation, a tenth of the corpus", lines // 10, seconds, peak)
    bench.empty()
    ours = bench.note("ingest", "labelstation", lines, *bench.script("ingest", str(RAW))[:2])
    compare(ours, rows)
    bench.note("ingest", "labelstation, nothing changed", lines, *bench.script("ingest", str(RAW))[:2])
    bench.empty()


def insert_row_by_row(bench: Bench, lines: int) -> None:
    """What one writes first: read a line and its files, insert its rows, commit."""
    with (
        (RAW / "metadata.jsonl").open(encoding="utf-8") as metadata,
        psycopg.connect(bench.postgres.dsn("labelstation", "data_factory")) as connection,
    ):
        for line in islice(metadata, lines):
            record = json.loads(line)
            md5 = hashlib.md5((RAW / record["file_path"]).read_bytes()).hexdigest()
            row = connection.execute(
                """
                INSERT INTO samples (
                    external_id, source_type, audio_path, audio_file_md5, duration_seconds, language_tags, captured_at,
                    title, metadata
                )
                VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)
                RETURNING sample_id
                """,
                [
                    record["id"], record["type"], record["file_path"], md5, record["duration"],
                    record["language_tags"], record["captured_at"], record.get("title"), line,
                ],
            ).fetchone()  # fmt: skip
            assert row is not None
            connection.execute(
                "INSERT INTO sample_changes (sample_id, sync_version, kind, content_hash, source) "
                "VALUES (%s, 1, 'audio', %s, 'crawler')",
                [row[0], md5],
            )
            for kind in ("transcript", "translation"):
                if f"{kind}_file" in record:
                    text = json.loads((RAW / record[f"{kind}_file"]).read_text(encoding="utf-8"))
                    connection.execute(
                        "INSERT INTO revisions (sample_id, kind, text, segments, source) "
                        "VALUES (%s, %s, %s, %s, 'crawler')",
                        [row[0], kind, text["full_text"], json.dumps(text["segments"])],
                    )
            connection.commit()


# Push


def bench_push(bench: Bench) -> None:
    """10,000 tasks, beside one POST a task and beside Label Studio's own import in bulk."""
    number = bench.options.tasks
    bench.empty()
    add_samples(bench, number)
    with bench.database("data_factory") as connection:
        rows = connection.execute("SELECT sample_id::text, text FROM transcript_revisions").fetchall()
    tasks = [
        {
            "data": {"audio": f"http://localhost/{sample_id}.wav", "text": text, "sample_id": sample_id},
            "meta": {KEY: sample_id},
        }
        for sample_id, text in rows
    ]
    some = bench.options.posts
    one_by_one = bench.note("push", "one POST a task", some, timed(lambda: post_one_by_one(bench, tasks[:some])))
    raw = bench.note(
        "push", "Label Studio's import, 1,000 a request", number, timed(lambda: import_in_bulk(bench, tasks))
    )
    with bench.database("label_studio") as connection:
        connection.execute("TRUNCATE task, task_completion CASCADE")
    ours = bench.note("push", "labelstation", number, *bench.script("push", "--task-type", "transcript_correction")[:2])
    compare(ours, one_by_one)
    compare(ours, raw)


def add_samples(bench: Bench, number: int) -> None:
    """Samples with audio and a transcript, as ingest leaves them."""
    with bench.database("data_factory") as connection:
        connection.execute(
            """
            WITH added AS (
                INSERT INTO samples (external_id, source_type, audio_path, audio_file_md5, duration_seconds)
                SELECT 'clip-' || n, 'manual_upload', 'audio/clip-' || n || '.wav', md5(n::text), 5
                FROM generate_series((SELECT count(*) FROM samples) + 1, (SELECT count(*) FROM samples) + %s) AS n
                RETURNING sample_id, external_id
            )
            INSERT INTO revisions (sample_id, kind, version, sync_version, text, source)
            SELECT
                sample_id, 'transcript', 1, 1, 'hôm nay mình sẽ review cái performance của model ' || external_id,
                'crawler'
            FROM added
            """,
            [number],
        )
        connection.execute("ANALYZE")


def post_one_by_one(bench: Bench, tasks: list[dict[str, Any]]) -> None:
    """One request a task."""
    with requests.Session() as session:
        session.headers.update(bench.headers)
        for task in tasks:
            answer = session.post(
                f"{bench.server.address}/api/tasks/", json={**task, "project": bench.project}, timeout=60
            )
            answer.raise_for_status()


def import_in_bulk(bench: Bench, tasks: list[dict[str, Any]]) -> None:
    """Label Studio's import, without any of push's care."""
    for start in range(0, len(tasks), 1000):
        answer = requests.post(
            f"{bench.server.address}/api/projects/{bench.project}/import?return_task_ids=true",
            json=tasks[start : start + 1000],
            headers=bench.headers,
            timeout=300,
        )
        answer.raise_for_status()


# Pull


def bench_pull(bench: Bench) -> None:
    """All annotations for the first time, beside the JSON export; then a few changed of many."""
    number, changed, large = bench.options.annotations, 100, bench.options.large
    bench.empty()
    pushed_and_annotated(bench, number)
    address = f"{bench.server.address}/api/projects/{bench.project}/export?exportType=JSON"
    export = bench.note(
        "pull", "Label Studio's JSON export", number, timed(lambda: download(address, bench.headers, number))
    )
    pull = ("pull", "--task-type", "transcript_correction")
    ours = bench.note("pull", "labelstation, first time", number, *bench.script(*pull)[:2])
    compare(ours, export)
    age_annotations(bench)
    bench.script(*pull)
    bench.note("pull", f"labelstation, nothing changed of {number:,}", number, *bench.script(*pull)[:2])
    change_annotations(bench, changed)
    bench.note("pull", f"labelstation, {changed} changed of {number:,}", changed, *bench.script(*pull)[:2])
    pushed_and_annotated(bench, large - number)
    bench.script(*pull)
    age_annotations(bench)
    bench.script(*pull)
    change_annotations(bench, changed)
    bench.note("pull", f"labelstation, {changed} changed of {large:,}", changed, *bench.script(*pull)[:2])


def download(address: str, headers: dict[str, str], expected: int) -> None:
    """Read a JSON document as a script would."""
    answer = requests.get(address, headers=headers, timeout=3600)
    answer.raise_for_status()
    if len(answer.json()) != expected:
        raise SystemExit(f"the JSON export holds {len(answer.json())} tasks, not {expected}")


def pushed_and_annotated(bench: Bench, number: int) -> None:
    """Pushed samples with an annotation each, made in both databases at once as a push and people leave them."""
    add_samples(bench, number)
    with bench.database("data_factory") as data_factory, bench.database("label_studio") as label_studio_db:
        data_factory.execute(
            """
            WITH pushed AS (
                INSERT INTO tasks (
                    sample_id, task_type, project_id, label_studio_task_id, state, reserved_at, pushed_at
                )
                SELECT
                    s.sample_id, 'transcript_correction', %(project)s, s.arrival, 'open',
                    now() - interval '2 hours', now() - interval '2 hours'
                FROM samples AS s
                WHERE NOT EXISTS (SELECT FROM tasks AS t WHERE t.sample_id = s.sample_id)
                RETURNING task_key, sample_id
            )
            INSERT INTO task_showings (task_key, shown_since, sync_version, transcript_version, audio_file_md5)
            SELECT p.task_key, now() - interval '2 hours', s.sync_version, 1, s.audio_file_md5
            FROM pushed AS p INNER JOIN samples AS s USING (sample_id)
            """,
            {"project": bench.project},
        )
        data_factory.execute("UPDATE samples SET locked_by = 'label_studio', locked_at = now() WHERE sync_version = 1")
        data_factory.execute("VACUUM ANALYZE")
        tasks = "COPY (SELECT label_studio_task_id, sample_id, task_key FROM tasks) TO STDOUT"
        label_studio_db.execute("CREATE TEMPORARY TABLE pushed (id integer, sample_id text, task_key text)")
        with (
            data_factory.cursor().copy(tasks) as source,
            label_studio_db.cursor().copy("COPY pushed FROM STDIN") as target,
        ):
            for rows in source:
                target.write(rows)
        label_studio_db.execute(
            """
            INSERT INTO task (
                id, data, meta, created_at, updated_at, is_labeled, project_id, overlap, inner_id, total_annotations,
                cancelled_annotations, total_predictions, comment_count, unresolved_comment_count
            )
            SELECT
                id,
                jsonb_build_object(
                    'audio', 'http://localhost/' || id || '.wav', 'text', 'xin chào', 'sample_id', sample_id
                ),
                jsonb_build_object(%(key)s::text, task_key),
                now() - interval '2 hours', now() - interval '1 hour', true,
                %(project)s, 1, id, 1, 0, 0, 0, 0
            FROM pushed
            ON CONFLICT (id) DO NOTHING
            """,
            {"key": KEY, "project": bench.project},
        )
        label_studio_db.execute(
            """
            INSERT INTO task_completion (
                result, was_cancelled, ground_truth, created_at, updated_at, task_id, project_id, completed_by_id,
                lead_time, result_count, unique_id
            )
            SELECT
                jsonb_build_array(
                    jsonb_build_object(
                        'id', 'r1', 'type', 'textarea', 'from_name', 'corrected_transcript', 'to_name', 'audio',
                        'value', jsonb_build_object('text', jsonb_build_array('hôm nay mình sẽ review model ' || id))
                    ),
                    jsonb_build_object(
                        'id', 'r2', 'type', 'rating', 'from_name', 'confidence', 'to_name', 'audio',
                        'value', jsonb_build_object('rating', 4)
                    )
                ),
                false, false, now(), now(), id, %(project)s, 1, 12.5, 2, gen_random_uuid()
            FROM pushed
            WHERE id NOT IN (SELECT task_id FROM task_completion)
            """,
            {"project": bench.project},
        )
        label_studio_db.execute("DROP TABLE pushed")
        label_studio_db.execute("VACUUM ANALYZE")


def age_annotations(bench: Bench) -> None:
    """Let an hour pass since the last annotation: pulls go back a few minutes."""
    with bench.database("label_studio") as connection:
        connection.execute(
            "UPDATE task_completion "
            "SET created_at = created_at - interval '1 hour', updated_at = updated_at - interval '1 hour'"
        )
        connection.execute("VACUUM ANALYZE")
    with bench.database("data_factory") as connection:
        connection.execute("UPDATE submitted_annotations SET changed_at = changed_at - interval '1 hour'")
        connection.execute("VACUUM ANALYZE")


def change_annotations(bench: Bench, number: int) -> None:
    """People send some annotations in again."""
    with bench.database("label_studio") as connection:
        connection.execute(
            """
            UPDATE task_completion
            SET updated_at = now(), result = jsonb_set(result, '{0,value,text,0}', to_jsonb('đã sửa ' || id))
            WHERE id IN (SELECT id FROM task_completion ORDER BY md5(id::text) LIMIT %s)
            """,
            [number],
        )


# Export


def bench_export(bench: Bench) -> None:
    """Reviewed samples into folders, beside copying the same audio before and after."""
    number = bench.options.samples
    bench.empty()
    shutil.rmtree(RAW, ignore_errors=True)
    reviewed_samples(bench, number)
    subprocess.run(["sync"], check=True)
    before = copy_audio("copy-before")
    ours = bench.note("export", "labelstation", number, *bench.script("export")[:2])
    subprocess.run(["sync"], check=True)
    after = copy_audio("copy-after")
    copying, flushing = ((first + second) / 2 for first, second in zip(before, after, strict=True))
    compare(ours, bench.note("export", "cp -r of the audio", number, copying))
    compare(ours, bench.note("export", "cp -r of the audio, and flushed to disk", number, copying + flushing))
    bench.note("export", "labelstation, nothing changed", number, *bench.script("export")[:2])


def copy_audio(name: str) -> tuple[float, float]:
    """Seconds for copying the recordings into a new folder, and for flushing them to disk."""
    copy = FOLDER / name
    copying = timed(lambda: subprocess.run(["cp", "-r", RAW / "audio", copy], check=True))
    return copying, timed(lambda: subprocess.run(["sync", "--file-system", copy], check=True))


def reviewed_samples(bench: Bench, number: int) -> None:
    """Reviewed samples with five seconds of audio each, in files of their own."""
    add_samples(bench, number)
    audio = os.urandom(16_000 * 2 * 5)
    (RAW / "audio").mkdir(parents=True)
    with bench.database("data_factory") as connection:
        for (path,) in connection.execute("SELECT audio_path FROM samples").fetchall():
            (RAW / path).write_bytes(audio)
            os.utime(RAW / path, ns=(0, 0))
        connection.execute(
            "UPDATE samples SET audio_file_md5 = %s, audio_size_bytes = %s, audio_modified_ns = 0",
            [hashlib.md5(audio).hexdigest(), len(audio)],
        )
        connection.execute("INSERT INTO annotators (annotator_id, label_studio_user_id) VALUES (1, 1)")
        connection.execute(
            """
            WITH done AS (
                INSERT INTO tasks (sample_id, task_type, project_id, label_studio_task_id, state)
                SELECT sample_id, 'transcript_correction', %s, arrival, 'done' FROM samples
                RETURNING task_key, sample_id, label_studio_task_id
            ),
            submitted AS (
                INSERT INTO submitted_annotations (
                    label_studio_annotation_id, task_key, annotator_id, status, result, text, began_at, submitted_at,
                    changed_at
                )
                SELECT
                    d.label_studio_task_id, d.task_key, w.annotator_id, 'completed', '[]', 'đã sửa', now(), now(), now()
                FROM done AS d CROSS JOIN annotators AS w
                RETURNING annotation_id, task_key
            )
            INSERT INTO revisions (
                sample_id, kind, version, sync_version, text, source, annotation_id, created_by, audio_file_md5
            )
            SELECT
                d.sample_id, 'transcript', 2, 2, 'hôm nay mình sẽ review cái performance của model mới', 'human',
                s.annotation_id, 'annotator-001', %s
            FROM done AS d INNER JOIN submitted AS s USING (task_key)
            """,
            [bench.project, hashlib.md5(audio).hexdigest()],
        )
        connection.execute("ANALYZE")


# export first: making files is slow on ext4 for a while after many have been deleted, as between the other steps.
STEPS = {"export": bench_export, "ingest": bench_ingest, "push": bench_push, "pull": bench_pull}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "steps", nargs="*", choices=[*STEPS, []], metavar="STEP", help=f"{' | '.join(STEPS)} (default: all)"
    )
    for name, default, what in (
        ("lines", 1_000_000, "lines of the corpus to ingest"),
        ("rows", 5_000, "lines to insert row by row"),
        ("tasks", 10_000, "tasks to push"),
        ("posts", 200, "tasks to post one by one"),
        ("annotations", 20_000, "annotations to pull"),
        ("large", 200_000, "annotations of the larger corpus"),
        ("samples", 20_000, "samples to export"),
    ):
        options.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default:,})")
    return options


def show(results: list[Measure]) -> None:
    """Print the table."""
    table = Table(box=None, pad_edge=False)
    for heading in ("step", "way", "items", "seconds", "ms each", "peak MiB", "labelstation is"):
        table.add_column(heading, justify="left" if heading in ("step", "way") else "right", no_wrap=True)
    for result in results:
        table.add_row(
            result.step, result.way, f"{result.items:,}", f"{result.seconds:.2f}",
            f"{result.seconds / result.items * 1000:.3f}", str(result.peak_mib or ""), result.ratio,
        )  # fmt: skip
    Console(width=130).print(table)


def main() -> None:
    """Run the wanted steps."""
    options = parser().parse_args()
    bench = Bench(options)
    try:
        for name in options.steps or STEPS:
            STEPS[name](bench)
    finally:
        bench.stop()
    show(bench.results)
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    (FOLDER / "results.json").write_text(
        json.dumps({**machine, "results": [asdict(result) for result in bench.results]}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
