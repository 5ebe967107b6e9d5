"""What tests share."""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import requests

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


@contextmanager
def start_script(name: str, *arguments: str, env_file: Path) -> Iterator[subprocess.Popen[str]]:
    """Start one of the scripts and go on; it is killed at the end if it still runs."""
    running = subprocess.Popen(
        [sys.executable, str(PROJECT / "scripts" / f"{name}.py"), "--env-file", str(env_file), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=env_file.parent,
        env={"PATH": os.environ["PATH"]},
    )
    with running:
        try:
            yield running
        finally:
            running.kill()


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


@dataclass
class Annotator:
    """A person at work in Label Studio, through its API."""

    address: str
    session: requests.Session = field(default_factory=requests.Session)

    def __post_init__(self) -> None:
        # gunicorn drops idle connections after two seconds, possibly while the next request is on its way.
        self.session.headers["Connection"] = "close"

    @classmethod
    def invited(cls, address: str, admin_token: str, email: str) -> "Annotator":
        """Sign up with an invitation, as a new annotator does."""
        link = requests.get(f"{address}/api/invite", headers={"Authorization": f"Token {admin_token}"}, timeout=30)
        page = f"{address}{link.json()['invite_url']}"
        person = cls(address)
        form = person.session.get(page, timeout=30).text
        token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', form)
        assert token is not None
        answer = person.session.post(
            page,
            data={"email": email, "password": "correct horse", "csrfmiddlewaretoken": token[1]},
            headers={"Referer": page},
            timeout=30,
        )
        answer.raise_for_status()
        return person

    @classmethod
    def with_token(cls, address: str, token: str) -> "Annotator":
        """The account that a legacy token belongs to."""
        person = cls(address)
        person.session.headers["Authorization"] = f"Token {token}"
        return person

    def call(self, method: str, path: str, body: object = None) -> Any:
        """One request to the API."""
        headers = {"X-CSRFToken": self.session.cookies.get("csrftoken", ""), "Referer": self.address}
        answer = self.session.request(method, self.address + path, json=body, headers=headers, timeout=60)
        assert answer.ok, f"{method} {path}: {answer.status_code} {answer.text[:500]}"
        return answer.json() if answer.content else None

    def annotate(
        self, task_id: int, result: list[dict[str, Any]], *, lead_time: float = 0.001, skip: bool = False
    ) -> int:
        """Submit or skip; returns the annotation's id."""
        body = {"result": result, "lead_time": lead_time, "was_cancelled": skip}
        return int(self.call("POST", f"/api/tasks/{task_id}/annotations/", body)["id"])

    def change(self, annotation_id: int, result: list[dict[str, Any]]) -> None:
        """Submit again."""
        self.call("PATCH", f"/api/annotations/{annotation_id}/", {"result": result})

    def delete_annotation(self, annotation_id: int) -> None:
        self.call("DELETE", f"/api/annotations/{annotation_id}/")

    def delete_task(self, task_id: int) -> None:
        self.call("DELETE", f"/api/tasks/{task_id}/")
