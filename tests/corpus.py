"""A small corpus in the crawler's format, to change and deliver again."""

import json
from pathlib import Path
from typing import Any


class SmallCorpus:
    """Lines by id, in order; `write` puts them on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: dict[str, dict[str, Any]] = {}
        for name in ("audio", "text"):
            (folder / name).mkdir(parents=True)

    def add(self, external_id: str, transcript: str | None = "xin chào", translation: str | None = "hello") -> None:
        """Add a sample with audio and the texts that are not None."""
        self.lines[external_id] = {
            "id": external_id,
            "type": "manual_upload",
            "file_path": f"audio/{external_id}.wav",
            "duration": 2.5,
            "language_tags": ["vi", "en"],
            "captured_at": "2026-01-31",
        }
        self.set_audio(external_id, f"RIFF {external_id}")
        if transcript is not None:
            self.set_text(external_id, "transcript", transcript)
        if translation is not None:
            self.set_text(external_id, "translation", translation)

    def set_audio(self, external_id: str, content: str) -> None:
        (self.folder / "audio" / f"{external_id}.wav").write_text(content)

    def set_text(self, external_id: str, kind: str, text: str, **fields: Any) -> None:
        path = f"text/{external_id}.{kind}.json"
        language = {"language": "vi"} if kind == "transcript" else {"language": "vi", "target_language": "en"}
        document = {**language, "segments": [], "full_text": text, **fields}
        (self.folder / path).write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
        self.lines[external_id][f"{kind}_file"] = path

    def write(self) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines.values())
        (self.folder / "metadata.jsonl").write_text(text, encoding="utf-8")
