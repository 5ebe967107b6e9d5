"""What tests share."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from station.local_services import PROJECT

Connection = psycopg.Connection[tuple[Any, ...]]


def run_script(name: str, *arguments: str, env_file: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of the scripts as its own process, as everyone does."""
    return subprocess.run(
        [sys.executable, str(PROJECT / "scripts" / f"{name}.py"), "--env-file", str(env_file), *arguments],
        capture_output=True,
        text=True,
        cwd=env_file.parent,
        env={"PATH": os.environ["PATH"], **environment},
        check=False,
        timeout=240,
    )


def launch_script(name: str, *arguments: str, env_file: Path, **environment: str) -> subprocess.Popen[str]:
    """Start one of the scripts and go on; `finish` waits for it."""
    return subprocess.Popen(
        [sys.executable, str(PROJECT / "scripts" / f"{name}.py"), "--env-file", str(env_file), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=env_file.parent,
        env={"PATH": os.environ["PATH"], **environment},
    )


def finish(running: subprocess.Popen[str], expect: int = 0) -> tuple[str, str]:
    """Wait for a script that was launched; returns its stdout and stderr."""
    output, errors = running.communicate(timeout=120)
    assert running.returncode == expect, f"{running.returncode}\n{output}\n{errors}"
    return output, errors


@contextmanager
def start_script(name: str, *arguments: str, env_file: Path) -> Iterator[subprocess.Popen[str]]:
    """Start one of the scripts and go on; it is killed at the end if it still runs."""
    with launch_script(name, *arguments, env_file=env_file) as running:
        try:
            yield running
        finally:
            running.kill()


def eventually(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.01)


class RandomKills:
    """Kills at instants spread over the time that the work takes on this machine.

    Args:
        db: the database that the work is done in.
        seed: of the random instants.
        longest: seconds after which the first kill comes at the latest; shrinks as long as kills come too late.
    """

    def __init__(self, db: Connection, seed: int, longest: float) -> None:
        self.db = db
        self.chance = random.Random(seed)
        self.longest = longest
        self.number = 0

    def strike(self, running: subprocess.Popen[str]) -> None:
        """Kill a script some time after it has connected, unless it ends before that."""
        eventually(lambda: running.poll() is not None or self.at_work(), "the script connects")
        try:
            running.communicate(timeout=self.chance.uniform(0, self.longest))
        except subprocess.TimeoutExpired:
            running.kill()
            running.communicate()
            self.number += running.returncode == -signal.SIGKILL
        else:
            self.longest *= 0.8
        eventually(lambda: not self.at_work(), "PostgreSQL notices that the script is gone")

    def at_work(self) -> bool:
        query = """
            SELECT FROM pg_stat_activity
            WHERE application_name LIKE 'labelstation-%' AND datname = current_database()
            """
        return self.db.execute(query).fetchone() is not None


def write_settings(file: Path, **settings: str) -> Path:
    file.write_text("".join(f"{name}='{value}'\n" for name, value in settings.items()))
    return file


def add_sample(
    db: Connection,
    external_id: str,
    transcript: str | None = "xin chào các bạn",
    translation: str | None = "hello everyone",
    *,
    audio: bool = True,
    priority: int = 0,
) -> str:
    """A sample as ingest leaves it; returns its id."""
    row = db.execute(
        """
        INSERT INTO samples (external_id, source_type, audio_path, audio_file_md5, duration_seconds, priority)
        VALUES (%s, 'manual_upload', %s, %s, %s, %s)
        RETURNING sample_id::text
        """,
        [
            external_id,
            f"audio/{external_id}.wav" if audio else None,
            hashlib.md5(external_id.encode()).hexdigest() if audio else None,
            2.5 if audio else None,
            priority,
        ],
    ).fetchone()
    assert row is not None
    for kind, text in (("transcript", transcript), ("translation", translation)):
        if text is not None:
            change_text(db, row[0], kind, text)
    return str(row[0])


def change_text(db: Connection, sample_id: str, kind: str, text: str) -> None:
    """The crawler delivers a new text."""
    db.execute(
        "INSERT INTO revisions (sample_id, kind, text, source) VALUES (%s, %s, %s, 'crawler')", [sample_id, kind, text]
    )


def change_audio(db: Connection, sample_id: str) -> None:
    """The crawler delivers other audio."""
    db.execute(
        """
        WITH changed AS (
            UPDATE samples
            SET audio_file_md5 = md5(audio_file_md5), sync_version = sync_version + 1
            WHERE sample_id = %s
            RETURNING sample_id, sync_version, audio_file_md5
        )
        INSERT INTO sample_changes (sample_id, sync_version, kind, content_hash, source)
        SELECT sample_id, sync_version, 'audio', audio_file_md5, 'crawler' FROM changed
        """,
        [sample_id],
    )


def text_result(control: str, text: str, to_name: str = "audio") -> list[dict[str, Any]]:
    """An annotation's result as the labelling page sends it."""
    entry = {"id": "r1", "type": "textarea", "from_name": control, "to_name": to_name, "origin": "manual"}
    return [{**entry, "value": {"text": [text]}}]
