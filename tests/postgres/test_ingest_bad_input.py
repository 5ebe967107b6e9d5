"""What an ingest says about input that is wrong; the lines beside it go in."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from corpus import SmallCorpus
from support import Connection, run_script, write_settings

Spoil = Callable[[SmallCorpus], None]


def field(name: str, value: object) -> Spoil:
    def spoil(corpus: SmallCorpus) -> None:
        corpus.lines["bad"][name] = value

    return spoil


def without(name: str) -> Spoil:
    def spoil(corpus: SmallCorpus) -> None:
        del corpus.lines["bad"][name]

    return spoil


def file(path: str, content: bytes, name: str = "file_path") -> Spoil:
    def spoil(corpus: SmallCorpus) -> None:
        (corpus.folder / path).write_bytes(content)
        corpus.lines["bad"][name] = path

    return spoil


def transcript(content: str | bytes) -> Spoil:
    return file("text/bad.json", content.encode() if isinstance(content, str) else content, "transcript_file")


def link(target: str, path: str = "audio/link.wav") -> Spoil:
    def spoil(corpus: SmallCorpus) -> None:
        outside = corpus.folder.parent / "outside"
        outside.mkdir()
        (outside / "secret.wav").write_text("secret")
        (corpus.folder / path).symlink_to(target)
        corpus.lines["bad"]["file_path"] = path if path.endswith(".wav") else f"{path}/secret.wav"

    return spoil


def not_a_file(corpus: SmallCorpus) -> None:
    (corpus.folder / "audio" / "folder").mkdir()
    corpus.lines["bad"]["file_path"] = "audio/folder"


SEGMENT = {"text": "a", "start": 1, "end": 2}
NEEDED = "Field required"

LINES: dict[str, tuple[Spoil, str]] = {
    "no type": (without("type"), f"type: {NEEDED}"),
    "unknown type": (field("type", "podcast"), "type: Input should be 'youtube_with_transcript'"),
    "no audio": (without("file_path"), "file_path: missing, and manual_upload has audio"),
    "no duration": (without("duration"), "duration: missing, and there is audio"),
    "no tags": (field("language_tags", []), "language_tags: List should have at least 1 item"),
    "tags in one text": (field("language_tags", "vi"), "language_tags: Input should be a valid array"),
    "tag that is a number": (field("language_tags", ["vi", 3]), "language_tags.1: Input should be a valid string"),
    "no such day": (field("captured_at", "2026-02-30"), "captured_at: day is out of range for month"),
    "date with time": (field("captured_at", "2026-02-03T00:00:00Z"), "captured_at: String should match pattern"),
    "date as a number": (field("captured_at", 20260203), "captured_at: Input should be a valid string"),
    "week date": (field("upload_date", "2026-W01-1"), "upload_date: String should match pattern"),
    "no length": (field("duration", 0), "duration: Input should be greater than 0"),
    "length in words": (field("duration", "2.5"), "duration: Input should be a valid number"),
    "endless": (field("duration", float("inf")), "duration: Input should be a finite number"),
    "priority with a fraction": (field("priority", 1.5), "priority: Input should be a valid integer"),
    "priority too large": (field("priority", 2**31), "priority: Input should be less than 2147483648"),
    "NUL in a field": (field("title", "a\0b"), "title: holds a NUL character"),
    "NUL in an unknown field": (field("note", {"deep": ["a\0b"]}), "note: holds a NUL character"),
    "NUL in a path": (field("file_path", "audio/a\0.wav"), "file_path: holds a NUL character"),
    "not a number": (field("note", float("nan")), "metadata: holds a number that is not finite"),
    "path above": (field("file_path", "audio/../../x.wav"), "file_path: 'audio/../../x.wav' is not a plain path"),
    "absolute path": (field("transcript_file", "/etc/passwd"), "transcript_file: '/etc/passwd' is not a plain path"),
    "audio elsewhere": (file("text/a.wav", b"RIFF"), "file_path: 'text/a.wav' does not lie below audio/"),
    "audio missing": (field("file_path", "audio/no.wav"), "file_path: there is no file 'audio/no.wav'"),
    "audio empty": (file("audio/empty.wav", b""), "file_path: 'audio/empty.wav' is empty"),
    "audio is a folder": (not_a_file, "file_path: 'audio/folder' is not a file"),
    "name too long": (field("file_path", "audio/" + "x" * 300), "cannot be read: File name too long"),
    "link out": (link("../../outside/secret.wav"), "cannot be read: a link leads out of the corpus"),
    "folder link out": (link("../../outside", "audio/folder"), "cannot be read: a link leads out of the corpus"),
    "link in a circle": (link("link.wav"), "file_path: 'audio/link.wav' is not a file"),
    "text missing": (field("translation_file", "text/no.json"), "translation_file: there is no file 'text/no.json'"),
    "text not JSON": (transcript("xin chào"), "transcript_file: 'text/bad.json': line: Invalid JSON"),
    "text not UTF-8": (transcript("chào".encode("utf-16")), "'text/bad.json': line: not UTF-8 from byte 1 on"),
    "text a list": (transcript("[]"), "'text/bad.json': line: Input should be an object"),
    "text without text": (transcript('{"full_text": " "}'), "full_text: there is no text, nor in segments"),
    "text with NUL": (transcript('{"full_text": "a\\u0000"}'), "full_text: holds a NUL character"),
    "half a character": (transcript('{"full_text": "\\ud83d"}'), "'text/bad.json': line: Invalid JSON"),
    "segment without end": (
        transcript(json.dumps({"segments": [{"text": "a", "start": 1}]})),
        f"segments.0.end: {NEEDED}",
    ),
    "segment backwards": (
        transcript(json.dumps({"segments": [SEGMENT, SEGMENT | {"end": 0.5}]})),
        "segments.1: ends before it starts",
    ),
    "segment of no length known": (
        transcript(json.dumps({"segments": [SEGMENT | {"end": float("nan")}]})),
        "segments.0.end: Input should be a finite number",
    ),
}


@pytest.fixture
def corpus(tmp_path: Path) -> SmallCorpus:
    result = SmallCorpus(tmp_path / "raw")
    for name in ("before", "bad", "after"):
        result.add(name)
    return result


def assert_only_the_others(db: Connection) -> None:
    assert db.execute("SELECT external_id FROM samples ORDER BY arrival").fetchall() == [("before",), ("after",)]


@pytest.mark.parametrize(("spoil", "reason"), LINES.values(), ids=LINES)
def test_a_bad_sample_is_reported_by_line_field_and_reason(
    corpus: SmallCorpus, settings_file: Path, db: Connection, spoil: Spoil, reason: str
) -> None:
    spoil(corpus)
    corpus.write()
    done = run_script("ingest", env_file=settings_file)
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("error: metadata.jsonl:2: ")
    assert reason in done.stderr
    assert done.stderr.endswith(" (id bad)\n")
    assert done.stderr.count("\n") == 1
    assert "rejected 1" in done.stdout
    assert_only_the_others(db)


RAW = {
    "not JSON": (b"{id: bad}", "line: Invalid JSON"),
    "cut off": (b'{"id": "bad", "type": "manu', "line: Invalid JSON"),
    "a list": (b'["bad"]', "line: Input should be an object"),
    "two objects": (b'{"id": "bad"} {"id": "bad"}', "line: Invalid JSON: trailing characters"),
    "not UTF-8": (b'{"id": "b\xe0d"}', "line: not UTF-8 from byte 10 on"),
    "nested too deep": (b'{"id": ' + b"[" * 5_000 + b"]" * 5_000 + b"}", "line: Invalid JSON: recursion limit"),
    "too long": (b'{"id": "bad", "note": "' + b"x" * 2**21 + b'"}', "line: longer than 1048576 bytes"),
    "no id": (b'{"type": "substack"}', f"id: {NEEDED}"),
    "id a number": (b'{"id": 7}', "id: Input should be a valid string"),
    "id empty": (b'{"id": ""}', "id: String should have at least 1 character"),
    "id too long": (b'{"id": "' + b"x" * 256 + b'"}', "id: String should have at most 255 characters"),
    "id with a break": (b'{"id": "a\\nb"}', "id: String should match pattern"),
    "id with NUL": (b'{"id": "a\\u0000b"}', "id: holds a NUL character"),
    "id of a copy": (b'{"id": "before#conflict-1"}', "id: ends as the id of a sample made by create_conflict_sample"),
}


@pytest.mark.parametrize(("line", "reason"), RAW.values(), ids=RAW)
def test_a_line_without_a_readable_id_is_reported(
    corpus: SmallCorpus, settings_file: Path, db: Connection, line: bytes, reason: str
) -> None:
    corpus.write()
    metadata = corpus.folder / "metadata.jsonl"
    lines = metadata.read_bytes().splitlines()
    metadata.write_bytes(b"\n".join([lines[0], line, lines[2]]))
    done = run_script("ingest", "--json", env_file=settings_file)
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("error: metadata.jsonl:2: ")
    assert reason in done.stderr
    assert "(id" not in done.stderr
    assert json.loads(done.stdout)["rejected"] == 1
    assert_only_the_others(db)


def test_the_second_line_with_an_id_is_rejected(corpus: SmallCorpus, settings_file: Path, db: Connection) -> None:
    corpus.lines["again"] = corpus.lines["before"] | {"title": "another"}
    del corpus.lines["bad"]
    corpus.write()
    for _ in range(2):
        done = run_script("ingest", env_file=settings_file)
        assert done.returncode == 3
        assert done.stderr == "error: metadata.jsonl:3: id: repeats that of line 1 (id before)\n"
        assert db.execute("SELECT title FROM samples WHERE external_id = 'before'").fetchone() == (None,)
    assert_only_the_others(db)


def test_very_many_bad_lines_are_counted_after_the_first_thousand(corpus: SmallCorpus, settings_file: Path) -> None:
    corpus.write()
    with (corpus.folder / "metadata.jsonl").open("a") as output:
        output.write("{}\n" * 1_500)
    done = run_script("ingest", env_file=settings_file)
    assert done.returncode == 3
    lines = done.stderr.splitlines()
    assert len(lines) == 1_001
    assert lines[0].startswith("error: metadata.jsonl:4: id: Field required")
    assert lines[-1] == "error: metadata.jsonl: and 500 more lines were rejected"
    assert "added 3" in done.stdout
    assert "rejected 1500" in done.stdout


def test_a_folder_that_is_no_corpus_is_named(tmp_path: Path, settings_file: Path) -> None:
    done = run_script("ingest", str(tmp_path), env_file=settings_file)
    assert (done.returncode, done.stderr) == (
        2, f"error: {tmp_path} is not a corpus: it has no file metadata.jsonl\n"
    )  # fmt: skip
    done = run_script("ingest", env_file=settings_file)
    assert done.returncode == 78
    assert done.stderr.startswith(f"error: RAW_DIR: {tmp_path / 'raw'} has no file metadata.jsonl")


def test_a_server_that_is_down_is_named(corpus: SmallCorpus, tmp_path: Path) -> None:
    corpus.write()
    env_file = write_settings(
        tmp_path / "down.env", DATA_FACTORY_DSN=f"host={tmp_path} dbname=data_factory", RAW_DIR=str(corpus.folder)
    )
    done = run_script("ingest", env_file=env_file)
    assert done.returncode == 75
    assert "PostgreSQL does not answer at DATA_FACTORY_DSN" in done.stderr
