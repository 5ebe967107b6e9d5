"""Samples with audio on disk and reviews in the database, as ingest and pull leave them."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from station.task_types import TASK_TYPES
from support import Connection

TRANSCRIPT, TRANSLATION, SEGMENTATION = TASK_TYPES


@dataclass(frozen=True)
class Reviews:
    """Makes samples below `raw` and reviews of them in `db`."""

    db: Connection
    raw: Path

    def add_sample(
        self, external_id: str, audio: bytes | None = b"RIFF", file_name: str | None = None, **columns: object
    ) -> str:
        values: dict[str, object] = {"external_id": external_id, "source_type": "manual_upload", **columns}
        if audio is not None:
            values.update(self.write_audio(file_name or f"audio/{external_id}.wav", audio))
        names = ", ".join(values)
        marks = ", ".join(f"%({name})s" for name in values)
        return self._one(f"INSERT INTO samples ({names}) VALUES ({marks}) RETURNING sample_id::text", values)

    def write_audio(self, file_name: str, audio: bytes) -> dict[str, object]:
        """Write a raw file; returns what ingest notes about it."""
        file = self.raw / file_name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(audio)
        return {
            "audio_path": file_name,
            "audio_file_md5": hashlib.md5(audio).hexdigest(),
            "audio_size_bytes": len(audio),
            "audio_modified_ns": file.stat().st_mtime_ns,
        }

    def crawl(self, sample_id: str, kind: str, text: str, language: str | None = None) -> int:
        """A text from the crawler; returns its version."""
        return int(
            self._one(
                "INSERT INTO revisions (sample_id, kind, text, language, source) VALUES (%s, %s, %s, %s, 'crawler') "
                "RETURNING version",
                [sample_id, kind, text, language],
            )
        )

    def add_task(
        self, sample_id: str, task_type: str = TRANSCRIPT, state: str = "done", gold: int | None = None
    ) -> str:
        return self._one(
            """
            INSERT INTO tasks (sample_id, task_type, project_id, label_studio_task_id, state, gold_id, pushed_at)
            VALUES (%s, %s, 1, (SELECT count(*) + 1 FROM tasks), %s, %s, now())
            RETURNING task_key::text
            """,
            [sample_id, task_type, state, gold],
        )

    def annotate(self, task_key: str, label_studio_user: int = 1) -> str:
        self.db.execute(
            "INSERT INTO annotators (annotator_id, label_studio_user_id) VALUES (%(user)s, %(user)s) "
            "ON CONFLICT DO NOTHING",
            {"user": label_studio_user},
        )
        return self._one(
            """
            INSERT INTO submitted_annotations (
                label_studio_annotation_id, task_key, annotator_id, status, result, began_at, submitted_at, changed_at
            )
            SELECT
                (SELECT count(*) + 1 FROM submitted_annotations), %s, annotator_id, 'completed', '[]',
                now(), now(), now()
            FROM annotators
            WHERE label_studio_user_id = %s
            RETURNING annotation_id::text
            """,
            [task_key, label_studio_user],
        )

    def review(
        self,
        sample_id: str,
        text: str | None = "reviewed",
        task_type: str = TRANSCRIPT,
        *,
        task_key: str | None = None,
        segments: object = None,
        language: str | None = None,
        source: str = "human",
    ) -> int:
        """A finished annotation and its revision, of the audio that the sample has now; returns the revision."""
        annotation_id = self.annotate(task_key or self.add_task(sample_id, task_type))
        return int(
            self._one(
                """
                INSERT INTO revisions (
                    sample_id, kind, text, segments, language, source, annotation_id, audio_file_md5
                )
                SELECT %s, %s, %s, %s, %s, %s, %s, audio_file_md5 FROM samples WHERE sample_id = %s
                RETURNING revision_id
                """,
                [
                    sample_id,
                    TASK_TYPES[task_type].revision_kind,
                    text,
                    None if segments is None else json.dumps(segments),
                    language,
                    source,
                    annotation_id,
                    sample_id,
                ],
            )
        )

    def add_many(self, count: int, audio: bytes = b"RIFF many", text: str = "reviewed") -> None:
        """So many samples with one reviewed transcript each; the audio is one file under many names."""
        first = self.write_audio("audio/many-0.wav", audio)
        for number in range(1, count):
            (self.raw / f"audio/many-{number}.wav").hardlink_to(self.raw / "audio/many-0.wav")
        self.db.execute(
            """
            WITH added AS (
                INSERT INTO samples (
                    external_id, source_type, audio_path, audio_file_md5, audio_size_bytes, audio_modified_ns,
                    duration_seconds
                )
                SELECT 'many-' || n, 'manual_upload', 'audio/many-' || n || '.wav', %(audio_file_md5)s,
                    %(audio_size_bytes)s, %(audio_modified_ns)s, 1.5
                FROM generate_series(0, %(count)s - 1) AS n
                RETURNING sample_id, arrival, audio_file_md5
            ), pushed AS (
                INSERT INTO tasks (sample_id, task_type, project_id, label_studio_task_id, state)
                SELECT sample_id, 'transcript_correction', 9, arrival, 'done' FROM added
                RETURNING task_key, sample_id, label_studio_task_id
            ), submitted AS (
                INSERT INTO submitted_annotations (
                    label_studio_annotation_id, task_key, status, result, began_at, submitted_at, changed_at
                )
                SELECT 1000000 + label_studio_task_id, task_key, 'completed', '[]', now(), now(), now() FROM pushed
                RETURNING annotation_id, task_key
            )
            INSERT INTO revisions (
                sample_id, kind, version, sync_version, text, source, annotation_id, audio_file_md5
            )
            SELECT sample_id, 'transcript', 1, 2, %(text)s, 'human', annotation_id, %(audio_file_md5)s
            FROM submitted INNER JOIN pushed USING (task_key)
            """,
            {**first, "count": count, "text": text},
        )

    def _one(self, query: str, values: Any) -> str:
        row = self.db.execute(query.encode(), values).fetchone()
        assert row is not None
        return str(row[0])


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def document(folder: Path, *parts: str) -> Any:
    return json.loads(folder.joinpath(*parts).read_text(encoding="utf-8"))
