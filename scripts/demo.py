#!/usr/bin/env python3
"""Run the whole loop on this machine: a PostgreSQL, a real Label Studio, an audio server and simulated annotators.

Everything lives in .local/demo of this folder. A second run goes on where the first one ended.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg
from rich.console import Console
from rich.table import Table

from station import cli
from station.errors import ExitCode, StationError, UnavailableError
from station.local_annotator import Annotator
from station.local_services import (
    PROJECT,
    Account,
    LocalPostgres,
    Server,
    audio_server,
    initialise_label_studio,
    label_studio,
)
from station.task_types import TASK_TYPES

FOLDER = Path(os.environ.get("LABELSTATION_DEMO_FOLDER") or PROJECT / ".local" / "demo")
CORPUS = PROJECT / "demo" / "corpus"
TRUTH = PROJECT / "demo" / "truth.jsonl"
ENV_FILE = FOLDER / "station.env"
RAW, REVIEWED = FOLDER / "data" / "raw", FOLDER / "data" / "reviewed"
PEOPLE = ("an", "binh", "chi")
PORTS = "ports.json"
# So many tasks of each project stay open for whoever looks at the demo.
LEFT_OPEN = 2
# What the first round pushes; samples with an open task are locked for the other task types.
FIRST_LIMITS = {"transcript_correction": "14", "translation_review": "6", "audio_segmentation": "6"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = cli.parser(__doc__ or "")
    options.add_argument("--once", action="store_true", help="run once, check that all numbers add up, stop everything")
    options.add_argument("--stop", action="store_true", help="stop a demo that runs")
    options.add_argument("--label-studio-port", type=cli.positive, metavar="PORT", help="default: 8085")
    options.add_argument("--audio-port", type=cli.positive, metavar="PORT", help="default: 8081")
    return options


def main(options: argparse.Namespace) -> ExitCode:
    """Start, work, show, stay."""
    if options.stop:
        return stop_running()
    console = Console(highlight=False, soft_wrap=True)
    began = time.monotonic()
    with only_demo():
        services = Services(*ports(options))
        try:
            account = services.start(console)
            demo = Demo(console, services, account)
            rounds(demo)
            problems = check_numbers(demo)
            show_summary(demo, problems, time.monotonic() - began)
            if not options.once:
                console.print("\nEverything stays up until Ctrl-C (or `make demo-stop`).")
                with contextlib.suppress(KeyboardInterrupt):
                    signal.pause()
        finally:
            services.stop()
    return ExitCode.UNEXPECTED if problems else ExitCode.DONE


# One demo at a time


@contextlib.contextmanager
def only_demo() -> Iterator[None]:
    """Hold the lock that a second demo finds taken."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "demo.pid").open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnavailableError(
                "a demo of this folder is already running: open its address, or `make demo-stop` first"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def stop_running() -> ExitCode:
    """Stop the demo that holds the lock, and servers that one left behind."""
    pid_file = FOLDER / "demo.pid"
    stopped = False
    if pid_file.exists():
        with pid_file.open(encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # Held, so the process is alive and its number has not been given to another.
                process = psutil.Process(int(lock.read()))
                process.terminate()
                process.wait(60)
                stopped = True
    stopped = Services(0, 0).stop() or stopped
    print("stopped" if stopped else "no demo is running")
    return ExitCode.DONE


def ports(options: argparse.Namespace) -> tuple[int, int]:
    """Ports asked for, else those of the last run (tasks hold the audio server's address), else the usual ones."""
    note = FOLDER / PORTS
    last = json.loads(note.read_text()) if note.exists() else [8085, 8081]
    return options.label_studio_port or last[0], options.audio_port or last[1]


# Servers


class Services:
    """The demo's servers."""

    def __init__(self, label_studio_port: int, audio_port: int) -> None:
        """Nothing is started yet."""
        self.postgres = LocalPostgres(FOLDER / "postgres")
        self.label_studio_folder = FOLDER / "label_studio"
        self.label_studio: Server = label_studio(self.label_studio_folder, self.postgres, label_studio_port)
        self.audio: Server = audio_server(FOLDER / "audio", RAW, audio_port)

    def start(self, console: Console) -> Account:
        """Start all, as far as possible side by side."""
        with step(console, "PostgreSQL"):
            if not (RAW / "metadata.jsonl").exists():
                shutil.copytree(CORPUS, RAW, dirs_exist_ok=True)
            self.postgres.start()
        with ThreadPoolExecutor() as pool:
            audio = pool.submit(self.audio.start)
            with step(console, "Label Studio (its very first start takes half a minute)"):
                account = initialise_label_studio(self.label_studio_folder, self.postgres)
                self.label_studio.start()
            with step(console, "audio server"):
                audio.result()
        (FOLDER / PORTS).write_text(json.dumps([self.label_studio.port, self.audio.port]))
        write_settings(self, account)
        return account

    def stop(self) -> bool:
        """Stop all; says whether anything ran."""
        ran = [self.label_studio.stop(), self.audio.stop(), self.postgres.is_running()]
        self.postgres.stop()
        return any(ran)


def write_settings(services: Services, account: Account) -> None:
    """Write the settings that the scripts, and `make push` and the others, use."""
    postgres = services.postgres
    values = {
        "LABEL_STUDIO_URL": f"http://localhost:{services.label_studio.port}",
        "LABEL_STUDIO_API_KEY": account.token,
        "AUDIO_SERVER_URL": f"http://localhost:{services.audio.port}",
        "DATA_FACTORY_DSN": postgres.dsn("labelstation", "data_factory"),
        "DATA_FACTORY_OWNER_DSN": postgres.dsn("labelstation_owner", "data_factory"),
        "LABEL_STUDIO_DSN": postgres.dsn("label_studio_reader", "label_studio"),
        "LABEL_STUDIO_OWNER_DSN": postgres.dsn("label_studio", "label_studio"),
        "RAW_DIR": str(RAW),
        "REVIEWED_DIR": str(REVIEWED),
    }
    ENV_FILE.touch(mode=0o600)
    ENV_FILE.write_text("".join(f"{name}='{value}'\n" for name, value in values.items()), encoding="utf-8")


@contextlib.contextmanager
def step(console: Console, what: str) -> Iterator[None]:
    """Show that something is going on, and how long it took."""
    began = time.monotonic()
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        console.print(f"  {what} …")
        yield
    console.print(f"[green]ok[/] {what} [dim]{time.monotonic() - began:.1f} s[/]")


# The loop


@dataclass
class Demo:
    """What the rounds need."""

    console: Console
    services: Services
    account: Account

    def run(self, script: str, *arguments: str, shown_as: str) -> None:
        """Run one of the scripts as a process of its own and show what it says."""
        began = time.monotonic()
        command = [sys.executable, str(PROJECT / "scripts" / f"{script}.py"), "--env-file", str(ENV_FILE), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise StationError(f"{script} ended with {done.returncode}: {done.stderr.strip()}")
        self.console.print(f"[bold]$ make {shown_as}[/] [dim]{time.monotonic() - began:.1f} s[/]")
        for line in done.stdout.splitlines():
            self.console.print(f"    {line}", markup=False)

    def query(self, database: str, query: str) -> list[tuple[Any, ...]]:
        """Rows of one of the two databases."""
        with psycopg.connect(self.services.postgres.dsn("postgres", database)) as connection:
            return connection.execute(query).fetchall()


def rounds(demo: Demo) -> None:
    """Ingest, push, work, pull, twice; then export."""
    demo.run("migrate", shown_as="migrate")
    demo.run("setup_projects", shown_as="setup-projects")
    demo.run("ingest", str(RAW), shown_as="ingest")
    first_time = demo.query("data_factory", "SELECT count(*) FROM tasks") == [(0,)]
    people = hire(demo)
    truth = read_truth(demo)
    if first_time:
        for name, limit in FIRST_LIMITS.items():
            demo.run("push", "--task-type", name, "--limit", limit, shown_as=f"push TASK={name} LIMIT={limit}")
        work(demo, people, truth, hasty=True)
        demo.run("pull", shown_as="pull")
        change_minds(demo, people, truth)
        demo.run("pull", shown_as="pull")
    for name in TASK_TYPES:
        demo.run("push", "--task-type", name, shown_as=f"push TASK={name}")
    work(demo, people, truth)
    demo.run("pull", shown_as="pull")
    demo.run("export", shown_as="export")


def hire(demo: Demo) -> dict[str, Annotator]:
    """Log the annotators in; the first time they are invited and sign up."""
    admin = Annotator.with_token(demo.services.label_studio.address, demo.account.token)
    known = {email for (email,) in demo.query("label_studio", "SELECT email FROM htx_user")}
    result = {}
    for name in PEOPLE:
        email, password = f"{name}@labelstation.example", f"{name}-annotates"
        person = Annotator(demo.services.label_studio.address)
        result[name] = person.log_in(email, password) if email in known else admin.invite(email, password)
    return result


@dataclass
class Truth:
    """What the simulated annotators hear: the truth of each sample."""

    by_sample: dict[str, dict[str, Any]]

    def result(self, task_type: str, task: dict[str, Any]) -> list[dict[str, Any]]:
        """What a careful person submits for a task."""
        truth = self.by_sample[task["data"]["sample_id"]]
        if task_type == "audio_segmentation":
            regions = [
                region("segment_labels", "labels", number, {**segment_times(segment), "labels": [segment["label"]]})
                for number, segment in enumerate(truth["segments"])
            ]
            return [*regions, entry("audio_quality", "rating", {"rating": 4})]
        if task_type == "translation_review":
            text = truth["translation"]
            quality = 5 if text == task["data"]["translation"] else 2
            return [
                entry("corrected_translation", "textarea", {"text": [text]}, "source"),
                entry("mt_quality", "rating", {"rating": quality}, "source"),
            ]
        return [
            entry("corrected_transcript", "textarea", {"text": [truth["transcript"]]}),
            entry("confidence", "rating", {"rating": 4}),
        ]


def entry(control: str, kind: str, value: dict[str, Any], to_name: str = "audio") -> dict[str, Any]:
    """One entry of a result, as the labelling page sends it."""
    return {
        "id": f"{control[:6]}-1",
        "from_name": control,
        "to_name": to_name,
        "type": kind,
        "origin": "manual",
        "value": value,
    }


def region(control: str, kind: str, number: int, value: dict[str, Any]) -> dict[str, Any]:
    """One region of a result."""
    return {**entry(control, kind, {"channel": 0, **value}), "id": f"region-{number}"}


def segment_times(segment: dict[str, Any]) -> dict[str, float]:
    """Start and end of a segment, in seconds."""
    return {"start": segment["start"], "end": segment["end"]}


def read_truth(demo: Demo) -> Truth:
    """Read the truth that lies beside the corpus."""
    sample_ids = dict(demo.query("data_factory", "SELECT external_id, sample_id::text FROM samples"))
    lines = [json.loads(line) for line in TRUTH.read_text(encoding="utf-8").splitlines()]
    return Truth({sample_ids[line["id"]]: line for line in lines if line["id"] in sample_ids})


def work(demo: Demo, people: dict[str, Annotator], truth: Truth, *, hasty: bool = False) -> None:
    """Let the annotators take turns at what the labelling stream gives them: most submit, a few skip.

    A hasty start leaves the first transcript as it stands.
    """
    done = skipped = 0
    with step(demo.console, "annotators at work"):
        for task_type, project_id in demo.query("data_factory", "SELECT task_type::text, project_id FROM projects"):
            query = f"SELECT count(*) FROM tasks WHERE state = 'open' AND task_type = '{task_type}'"
            ((still_open,),) = demo.query("data_factory", query)
            turns = list(people.values()) * still_open
            for number, person in enumerate(turns[: max(0, still_open - LEFT_OPEN)]):
                task = person.next_task(project_id)
                if task is None:
                    break
                skip = number % 7 == 3
                result = [] if skip else truth.result(task_type, task)
                if hasty and task_type == "transcript_correction" and number == 0:
                    result[0]["value"]["text"] = [task["data"]["text"]]
                person.annotate(task["id"], result, lead_time=0.05, skip=skip)
                skipped, done = skipped + skip, done + (not skip)
    demo.console.print(f"    {done} submitted, {skipped} skipped")


def change_minds(demo: Demo, people: dict[str, Annotator], truth: Truth) -> None:
    """Somebody sends a transcript in again, somebody deletes one."""
    rows = demo.query(
        "data_factory",
        """
        SELECT a.label_studio_annotation_id, a.label_studio_task_id, a.sample_id::text
        FROM annotations AS a
        WHERE a.status = 'completed' AND a.task_type = 'transcript_correction'
        ORDER BY a.label_studio_annotation_id
        """,
    )
    (again, _task, sample_id), (deleted, _deleted_task, _deleted_sample) = rows[0], rows[-1]
    person = people[PEOPLE[0]]
    task = {"data": {"sample_id": sample_id}}
    notes = entry("notes", "textarea", {"text": ["Listened again."]})
    person.change(again, [notes, *truth.result("transcript_correction", task)])
    person.delete_annotation(deleted)
    demo.console.print("    one transcript sent in again, one annotation deleted")


# The numbers


def check_numbers(demo: Demo) -> list[str]:
    """Compare what the ledger, Label Studio and the files say; returns what does not agree."""
    problems: list[str] = []

    def same(what: str, one: object, other: object) -> None:
        if one != other:
            problems.append(f"{what}: {one} is not {other}")

    lines = sum(1 for line in (RAW / "metadata.jsonl").open(encoding="utf-8") if line.strip())
    same("samples and lines of metadata.jsonl", demo.query("data_factory", "SELECT count(*) FROM samples"), [(lines,)])
    same(
        "tasks in the ledger and in Label Studio",
        demo.query(
            "data_factory",
            "SELECT label_studio_task_id, task_key::text FROM tasks WHERE state <> 'deleted' ORDER BY 1",
        ),
        demo.query("label_studio", "SELECT id, meta ->> 'labelstation_key' FROM task ORDER BY 1"),
    )
    same(
        "annotations in the ledger and in Label Studio",
        demo.query(
            "data_factory",
            "SELECT label_studio_annotation_id, status = 'skipped' FROM annotations "
            "WHERE status IN ('completed', 'skipped') ORDER BY 1",
        ),
        demo.query("label_studio", "SELECT id, was_cancelled FROM task_completion ORDER BY 1"),
    )
    same(
        "locked samples and samples with a task that can still be done",
        demo.query("data_factory", "SELECT count(*) FROM samples WHERE locked_by IS NOT NULL"),
        demo.query("data_factory", "SELECT count(DISTINCT sample_id) FROM tasks WHERE state IN ('open', 'skipped')"),
    )
    exported = sorted(
        str(folder.relative_to(REVIEWED)) for folder in REVIEWED.glob("*/*") if not folder.name.startswith(".")
    )
    manifest = [json.loads(line) for line in (REVIEWED / "manifest.jsonl").open(encoding="utf-8")]
    same("folders of reviewed data and lines of the manifest", exported, sorted(line["folder"] for line in manifest))
    done = {
        f"{TASK_TYPES[task_type].folder}/{sample_id}"
        for task_type, sample_id in demo.query(
            "data_factory", "SELECT task_type::text, sample_id::text FROM tasks WHERE state = 'done'"
        )
    }
    same("finished tasks and folders of reviewed data", sorted(done), exported)
    truth = read_truth(demo)
    for task_type, key in (("transcript_correction", "transcript"), ("translation_review", "translation")):
        for file in REVIEWED.glob(f"{TASK_TYPES[task_type].folder}/*/{TASK_TYPES[task_type].document}"):
            found = json.loads(file.read_text(encoding="utf-8"))["full_text"]
            same(f"text of {file.parent.name} and the truth", found, truth.by_sample[file.parent.name][key])
    return problems


def show_summary(demo: Demo, problems: list[str], seconds: float) -> None:
    """Say what happened and where to look."""
    console, address = demo.console, f"http://localhost:{demo.services.label_studio.port}"
    table = Table(title="\nWhat happened", title_style="bold", box=None, pad_edge=False)
    table.add_column("task type", no_wrap=True)
    names = ("pushed", "submitted", "skipped", "still open", "exported")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    counted = {
        row[0]: row[1:]
        for row in demo.query(
            "data_factory",
            """
            SELECT
                p.task_type::text,
                (SELECT count(*) FROM tasks AS t WHERE t.task_type = p.task_type),
                (SELECT count(*) FROM annotations AS a WHERE a.task_type = p.task_type AND a.status = 'completed'),
                (SELECT count(*) FROM annotations AS a WHERE a.task_type = p.task_type AND a.status = 'skipped'),
                (SELECT count(*) FROM tasks AS t WHERE t.task_type = p.task_type AND t.state = 'open'),
                (SELECT count(*) FROM exports AS e WHERE e.task_type = p.task_type)
            FROM projects AS p
            ORDER BY p.task_type
            """,
        )
    }
    for task_type, numbers in counted.items():
        table.add_row(task_type, *map(str, numbers))
    console.print(table)
    here = Path.cwd()
    where = Table(box=None, show_header=False, pad_edge=False)
    where.add_row("Label Studio", f"[bold]{address}[/]")
    where.add_row("login", f"{demo.account.email}  password {demo.account.password}")
    where.add_row("an annotator", f"{PEOPLE[0]}@labelstation.example  password {PEOPLE[0]}-annotates")
    where.add_row("reviewed data", os.path.relpath(REVIEWED, here))
    where.add_row("manifest", os.path.relpath(REVIEWED / "manifest.jsonl", here))
    where.add_row("settings", f"{os.path.relpath(ENV_FILE, here)} (what `make status`, `make push` … use)")
    where.add_row("logs", f"{os.path.relpath(FOLDER, here)}/*/*.log")
    console.print(where)
    if problems:
        console.print("\n[bold red]The numbers do not add up:[/]")
        for problem in problems:
            console.print(f"  {problem[:2000]}", markup=False)
    else:
        console.print(f"\n[bold green]All numbers add up[/] [dim]({seconds:.0f} s)[/]")


if __name__ == "__main__":
    cli.run(parser(), main)
