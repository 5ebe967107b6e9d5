"""What an ingest makes of a corpus, on a real PostgreSQL."""

import hashlib
import json
import os
import subprocess
import unicodedata
from pathlib import Path
from typing import Any

import psycopg
import pytest

from corpus import SmallCorpus
from station.local_services import LocalPostgres
from support import Connection, eventually, run_script, start_script

NOTHING = {
    "added": 0, "changed": 0, "changed_audio": 0, "changed_transcript": 0, "changed_translation": 0,
    "changed_metadata_only": 0, "unchanged": 0, "removed": 0, "returned": 0, "rejected": 0,
}  # fmt: skip


@pytest.fixture
def corpus(tmp_path: Path) -> SmallCorpus:
    result = SmallCorpus(tmp_path / "raw")
    result.add("a")
    result.add("b")
    return result


def ingest(corpus: SmallCorpus, settings_file: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    """Ingest the corpus; what it counted that is not 0."""
    corpus.write()
    done = run_script("ingest", "--json", *arguments, env_file=settings_file)
    assert done.returncode == code, done.stderr
    counts = json.loads(done.stdout)
    counts.pop("dry_run")
    assert set(counts) == set(NOTHING)
    return {name: count for name, count in counts.items() if count}


def ledger(db: Connection, external_id: str) -> list[tuple[int, str]]:
    """Versions and kinds of a sample's changes, in their order."""
    return db.execute(
        """
        SELECT c.sync_version, c.kind::text
        FROM sample_changes AS c
        INNER JOIN samples USING (sample_id)
        WHERE external_id = %s
        ORDER BY c.sync_version, c.kind
        """,
        [external_id],
    ).fetchall()


def texts(db: Connection, external_id: str, kind: str) -> list[str]:
    """A sample's texts of one kind, oldest first; their versions have no gaps."""
    found = db.execute(
        """
        SELECT version, text FROM revisions INNER JOIN samples USING (sample_id)
        WHERE external_id = %s AND kind = %s::revision_kind ORDER BY version
        """,
        [external_id, kind],
    ).fetchall()
    assert [version for version, _ in found] == list(range(1, len(found) + 1))
    return [text for _, text in found]


def row_versions(db: Connection) -> list[tuple[Any, ...]]:
    """Which transaction wrote each row last: equal when nothing was written."""
    return db.execute("SELECT external_id, xmin::text, ctid::text FROM samples ORDER BY external_id").fetchall()


def test_a_new_sample_has_version_1_a_ledger_row_for_each_kind_and_its_texts(
    corpus: SmallCorpus, settings_file: Path, db: Connection
) -> None:
    corpus.add("no texts", transcript=None, translation=None)
    corpus.lines["a"] |= {"priority": 7, "title": "T", "upload_date": "20251231", "views": {"count": 3}}
    assert ingest(corpus, settings_file) == {"added": 3}
    assert ledger(db, "a") == [(1, "audio"), (1, "transcript"), (1, "translation")]
    assert ledger(db, "no texts") == [(1, "audio")]
    assert texts(db, "a", "transcript") == ["xin chào"]
    assert texts(db, "a", "translation") == ["hello"]
    sample = db.execute(
        """
        SELECT sync_version, source_type, audio_path, audio_file_md5, duration_seconds, language_tags,
            captured_at::text, upload_date::text, title, priority, metadata, removed_at, locked_by
        FROM samples WHERE external_id = 'a'
        """
    ).fetchone()
    assert sample == (
        1, "manual_upload", "audio/a.wav", hashlib.md5(b"RIFF a").hexdigest(), 2.5, ["vi", "en"],
        "2026-01-31", "2025-12-31", "T", 7, {"views": {"count": 3}}, None, None,
    )  # fmt: skip
    assert (
        db.execute("SELECT DISTINCT source::text, run_id FROM sample_changes").fetchall()
        == db.execute("SELECT 'crawler', run_id FROM runs WHERE exit_code = 0").fetchall()
    )


def test_samples_arrive_in_the_order_of_their_lines(corpus: SmallCorpus, settings_file: Path, db: Connection) -> None:
    for number in (5, 3, 9, 1):
        corpus.add(f"n{number}")
    ingest(corpus, settings_file)
    order = [row[0] for row in db.execute("SELECT external_id FROM samples ORDER BY arrival").fetchall()]
    assert order == list(corpus.lines)


def test_an_unchanged_corpus_writes_no_row_and_reads_no_audio(
    corpus: SmallCorpus, settings_file: Path, db: Connection
) -> None:
    ingest(corpus, settings_file)
    before = row_versions(db)
    # The same size and time: if it were read, its hash would tell.
    for name in corpus.lines:
        file = corpus.folder / "audio" / f"{name}.wav"
        status = file.stat()
        file.write_text(file.read_text().replace("RIFF", "XXXX"))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert ingest(corpus, settings_file) == {"unchanged": 2}
    assert row_versions(db) == before


def test_touched_audio_is_the_same_version_and_is_hashed_once(
    corpus: SmallCorpus, settings_file: Path, db: Connection
) -> None:
    ingest(corpus, settings_file)
    updated = db.execute("SELECT updated_at FROM samples WHERE external_id = 'a'").fetchone()
    file = corpus.folder / "audio" / "a.wav"
    os.utime(file, ns=(1, 10**18))
    assert ingest(corpus, settings_file) == {"unchanged": 2}
    sample = db.execute("SELECT updated_at FROM samples WHERE external_id = 'a' AND sync_version = 1").fetchone()
    assert sample == updated
    before = row_versions(db)
    assert ingest(corpus, settings_file) == {"unchanged": 2}
    assert row_versions(db) == before


@pytest.mark.parametrize("kind", ["audio", "transcript", "translation"])
def test_a_change_of_one_kind_raises_the_version_with_one_ledger_row(
    corpus: SmallCorpus, settings_file: Path, db: Connection, kind: str
) -> None:
    ingest(corpus, settings_file)
    if kind == "audio":
        corpus.set_audio("a", "other sound")
    else:
        corpus.set_text("a", kind, "another text")
    assert ingest(corpus, settings_file) == {"changed": 1, f"changed_{kind}": 1, "unchanged": 1}
    assert ledger(db, "a")[3:] == [(2, kind)]
    assert db.execute("SELECT external_id, sync_version FROM samples ORDER BY 1").fetchall() == [("a", 2), ("b", 1)]
    assert texts(db, "a", "transcript") == ["xin chào"] + ["another text"] * (kind == "transcript")
    assert texts(db, "a", "translation") == ["hello"] + ["another text"] * (kind == "translation")
    latest = db.execute("SELECT max(sync_version) FROM revisions").fetchone()
    assert latest == (1 if kind == "audio" else 2,)
    hashed = db.execute("SELECT content_hash FROM sample_changes WHERE sync_version = 2").fetchone()
    assert hashed == (hashlib.md5(b"other sound" if kind == "audio" else b"another text").hexdigest(),)


def test_changes_of_several_kinds_share_one_version(corpus: SmallCorpus, settings_file: Path, db: Connection) -> None:
    ingest(corpus, settings_file)
    corpus.set_audio("a", "other sound")
    corpus.set_text("a", "transcript", "one")
    corpus.set_text("a", "translation", "two")
    counts = ingest(corpus, settings_file)
    assert counts == {
        "changed": 1, "changed_audio": 1, "changed_transcript": 1, "changed_translation": 1, "unchanged": 1
    }  # fmt: skip
    assert ledger(db, "a")[3:] == [(2, "audio"), (2, "transcript"), (2, "translation")]


def test_changed_metadata_is_stored_and_raises_nothing(
    corpus: SmallCorpus, settings_file: Path, db: Connection
) -> None:
    ingest(corpus, settings_file)
    corpus.lines["a"] |= {"title": "new", "likes": 3}
    assert ingest(corpus, settings_file) == {"changed": 1, "changed_metadata_only": 1, "unchanged": 1}
    assert len(ledger(db, "a")) == 3
    sample = db.execute("SELECT title, metadata, sync_version FROM samples WHERE external_id = 'a'").fetchone()
    assert sample == ("new", {"likes": 3}, 1)


def test_a_text_file_written_anew_with_the_same_text_raises_nothing(
    corpus: SmallCorpus, settings_file: Path, db: Connection
) -> None:
    ingest(corpus, settings_file)
    file = corpus.folder / "text" / "a.transcript.json"
    file.write_text(
        unicodedata.normalize("NFD", json.dumps(json.loads(file.read_text()), indent=2, ensure_ascii=False))
    )
    assert ingest(corpus, settings_file) == {"changed": 1, "changed_metadata_only": 1, "unchanged": 1}
    assert texts(db, "a", "transcript") == ["xin chào"]
    assert ledger(db, "a")[3:] == []
    assert ingest(corpus, settings_file) == {"unchanged": 2}


def test_a_text_that_is_no_longer_delivered_stays(corpus: SmallCorpus, settings_file: Path, db: Connection) -> None:
    ingest(corpus, settings_file)
    path = corpus.lines["a"].pop("transcript_file")
    assert ingest(corpus, settings_file) == {"changed": 1, "changed_metadata_only": 1, "unchanged": 1}
    assert texts(db, "a", "transcript") == ["xin chào"]
    corpus.lines["a"]["transcript_file"] = path
    assert ingest(corpus, settings_file) == {"changed": 1, "changed_metadata_only": 1, "unchanged": 1}
    assert texts(db, "a", "transcript") == ["xin chào"]
    assert len(ledger(db, "a")) == 3


def test_a_crawlers_text_comes_after_a_persons(corpus: SmallCorpus, settings_file: Path, db: Connection) -> None:
    ingest(corpus, settings_file)
    db.execute(
        "INSERT INTO transcript_revisions (sample_id, text, source) "
        "SELECT sample_id, 'by hand', 'human' FROM samples WHERE external_id = 'a'"
    )
    corpus.set_text("a", "transcript", "crawled again")
    ingest(corpus, settings_file)
    assert texts(db, "a", "transcript") == ["xin chào", "by hand", "crawled again"]
    assert ledger(db, "a")[3:] == [(2, "transcript"), (3, "transcript")]


def test_removed_samples_are_marked_once_and_can_return(
    corpus: SmallCorpus, settings_file: Path, db: Connection
) -> None:
    ingest(corpus, settings_file)
    db.execute("SELECT create_conflict_sample(sample_id, 'test') FROM samples WHERE external_id = 'b'")
    gone = corpus.lines.pop("a")
    assert ingest(corpus, settings_file) == {"unchanged": 1}
    assert ingest(corpus, settings_file, "--remove-missing", "--dry-run") == {"unchanged": 1, "removed": 1}
    assert ingest(corpus, settings_file, "--remove-missing") == {"unchanged": 1, "removed": 1}
    assert ledger(db, "a")[3:] == [(2, "removal")]
    removed = db.execute("SELECT external_id, sync_version FROM samples WHERE removed_at IS NOT NULL").fetchall()
    assert removed == [("a", 2)]
    assert ingest(corpus, settings_file, "--remove-missing") == {"unchanged": 1}
    corpus.lines["a"] = gone
    corpus.set_text("a", "transcript", "changed meanwhile")
    assert ingest(corpus, settings_file) == {"unchanged": 1, "returned": 1, "changed_transcript": 1}
    assert ledger(db, "a")[4:] == [(3, "transcript"), (3, "return")]
    assert db.execute("SELECT FROM samples WHERE removed_at IS NOT NULL").fetchall() == []
    assert ingest(corpus, settings_file) == {"unchanged": 2}


def test_a_corpus_that_lost_most_of_its_samples_removes_none_unless_told_so(
    corpus: SmallCorpus, settings_file: Path, db: Connection
) -> None:
    for number in range(30):
        corpus.add(f"n{number}")
    ingest(corpus, settings_file)
    for number in range(30):
        del corpus.lines[f"n{number}"]
    corpus.add("new")
    corpus.write()
    done = run_script("ingest", "--remove-missing", env_file=settings_file)
    assert done.returncode == 4
    assert "30 of 33 samples are missing" in done.stderr
    assert "--even-most" in done.stderr
    assert "added 1" in done.stdout
    assert db.execute("SELECT count(*) FROM samples WHERE removed_at IS NOT NULL").fetchone() == (0,)
    assert db.execute("SELECT exit_code FROM runs ORDER BY run_id DESC LIMIT 1").fetchone() == (4,)
    assert ingest(corpus, settings_file, "--remove-missing", "--even-most") == {"unchanged": 3, "removed": 30}


def test_a_rejected_line_does_not_count_as_missing(corpus: SmallCorpus, settings_file: Path, db: Connection) -> None:
    ingest(corpus, settings_file)
    corpus.lines["a"]["duration"] = "long"
    del corpus.lines["b"]
    assert ingest(corpus, settings_file, "--remove-missing", code=3) == {"rejected": 1, "removed": 1}
    assert db.execute("SELECT external_id FROM samples WHERE removed_at IS NULL").fetchall() == [("a",)]


def test_nothing_is_removed_when_a_rejected_lines_id_cannot_be_read(
    corpus: SmallCorpus, settings_file: Path, db: Connection
) -> None:
    ingest(corpus, settings_file)
    del corpus.lines["b"]
    corpus.lines["broken"] = {"id": 7}
    assert ingest(corpus, settings_file, "--remove-missing", code=3) == {"rejected": 1, "unchanged": 1}
    assert db.execute("SELECT FROM samples WHERE removed_at IS NOT NULL").fetchall() == []


def test_a_dry_run_counts_the_same_and_changes_nothing(
    corpus: SmallCorpus, settings_file: Path, db: Connection
) -> None:
    assert ingest(corpus, settings_file, "--dry-run") == {"added": 2}
    assert db.execute("SELECT (SELECT count(*) FROM samples), (SELECT count(*) FROM runs)").fetchone() == (0, 0)
    ingest(corpus, settings_file)
    corpus.set_text("a", "transcript", "changed")
    before = row_versions(db)
    assert ingest(corpus, settings_file, "-n") == {"changed": 1, "changed_transcript": 1, "unchanged": 1}
    assert row_versions(db) == before
    assert ingest(corpus, settings_file) == {"changed": 1, "changed_transcript": 1, "unchanged": 1}


def test_locks_are_left_alone(corpus: SmallCorpus, settings_file: Path, db: Connection) -> None:
    ingest(corpus, settings_file)
    db.execute("SELECT lock_sample_for_annotation(sample_id) FROM samples")
    locked = db.execute("SELECT external_id, locked_by, locked_at FROM samples ORDER BY 1").fetchall()
    corpus.set_text("a", "transcript", "changed")
    del corpus.lines["b"]
    ingest(corpus, settings_file, "--remove-missing")
    assert db.execute("SELECT external_id, locked_by, locked_at FROM samples ORDER BY 1").fetchall() == locked


def test_decomposed_text_arrives_composed(corpus: SmallCorpus, settings_file: Path, db: Connection) -> None:
    decomposed = unicodedata.normalize("NFD", "tiếng Việt")
    for name, text in (("written", decomposed), ("escaped", decomposed)):
        corpus.add(name, transcript=decomposed)
        corpus.lines[name] |= {"title": text, "note": {decomposed: [decomposed]}, "language_tags": [decomposed]}
    file = corpus.folder / "text" / "escaped.transcript.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    corpus.lines["escaped"]["title"] = decomposed
    ingest(corpus, settings_file)
    for name in ("written", "escaped"):
        assert texts(db, name, "transcript") == ["tiếng Việt"]
        sample = db.execute(
            "SELECT title, metadata, language_tags FROM samples WHERE external_id = %s", [name]
        ).fetchone()
        assert sample == ("tiếng Việt", {"note": {"tiếng Việt": ["tiếng Việt"]}}, ["tiếng Việt"])


@pytest.mark.parametrize(
    "text",
    [
        "she said \"không\" 'đúng' \\ back\\slash \\n not a break",
        "one\ntwo\r\nthree\ttab\\N",
        "emoji 😀👩‍👩‍👧 and \u2028 separators",
        "<script>alert('x')</script> & {curly, \"braces\"}",
        "dài " * 25_000,
    ],
    ids=["quotes", "breaks", "emoji", "script", "100 kB"],
)
def test_any_text_arrives_as_it_was(corpus: SmallCorpus, settings_file: Path, db: Connection, text: str) -> None:
    corpus.add("text", transcript=text, translation=text)
    corpus.lines["text"] |= {"title": text, "language_tags": [text], "note": text, "acoustic_meta": {"about": text}}
    assert ingest(corpus, settings_file) == {"added": 3}
    assert texts(db, "text", "transcript") == texts(db, "text", "translation") == [text]
    sample = db.execute(
        "SELECT title, language_tags, metadata, acoustic_meta FROM samples WHERE external_id = 'text'"
    ).fetchone()
    assert sample == (text, [text], {"note": text}, {"about": text})


def test_without_full_text_the_segments_are_joined(corpus: SmallCorpus, settings_file: Path, db: Connection) -> None:
    segments = [{"text": "một ", "start": 0, "end": 1.5}, {"text": " two", "start": 1.5, "end": 2}]
    corpus.set_text("a", "transcript", " ", segments=segments)
    ingest(corpus, settings_file)
    assert texts(db, "a", "transcript") == ["một two"]
    stored = db.execute("SELECT segments FROM revisions WHERE segments IS NOT NULL").fetchall()
    assert stored == [(segments,)]


def test_byte_order_mark_blank_lines_and_windows_line_ends_do_no_harm(
    corpus: SmallCorpus, settings_file: Path, db: Connection
) -> None:
    corpus.write()
    file = corpus.folder / "metadata.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n\r\n \r\n").rstrip())
    text = corpus.folder / "text" / "a.transcript.json"
    text.write_bytes(b"\xef\xbb\xbf" + text.read_bytes())
    done = run_script("ingest", env_file=settings_file)
    assert (done.returncode, done.stderr) == (0, "")
    assert texts(db, "a", "transcript") == ["xin chào"]


def test_the_commit_and_the_dvc_revision_are_recorded(
    corpus: SmallCorpus, settings_file: Path, db: Connection, tmp_path: Path
) -> None:
    md5 = "0123456789abcdef0123456789abcdef.dir"
    (tmp_path / "raw.dvc").write_text(f"outs:\n- md5: {md5}\n  size: 10\n  nfiles: 4\n  hash: md5\n  path: raw\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.example"]
    for command in (["init", "-q"], ["add", "raw.dvc"], ["commit", "-q", "-m", "data"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    ingest(corpus, settings_file)
    assert db.execute("SELECT DISTINCT dvc_commit_hash FROM samples").fetchall() == [(head,)]
    assert db.execute("SELECT DISTINCT dvc_revision FROM sample_changes").fetchall() == [(md5,)]
    run = db.execute("SELECT git_revision, dvc_revision, exit_code, counts->'added' FROM sync_runs").fetchall()
    assert run == [(head, md5, 0, 2)]


def test_dvc_lock_names_the_revision_of_the_output_not_of_a_dependency(
    corpus: SmallCorpus, settings_file: Path, db: Connection, tmp_path: Path
) -> None:
    (tmp_path / "dvc.lock").write_text(
        "schema: '2.0'\nstages:\n  check:\n    cmd: check\n    deps:\n    - path: raw\n      hash: md5\n"
        "      md5: 00000000000000000000000000000000.dir\n  crawl:\n    cmd: crawl\n    outs:\n"
        "    - path: other\n      md5: 22222222222222222222222222222222.dir\n"
        "    - path: raw\n      hash: md5\n      md5: 11111111111111111111111111111111.dir\n      size: 3\n"
    )
    ingest(corpus, settings_file)
    revisions = db.execute("SELECT DISTINCT dvc_revision FROM sample_changes").fetchall()
    assert revisions == [("1" * 32 + ".dir",)]


@pytest.mark.parametrize(
    ("config", "local", "cache"),
    [
        ("", "", ".dvc/cache"),
        ("[core]\n    analytics = false\n[cache]\n    type = symlink\n    dir = ../shared\n", "", "shared"),
        (
            "[cache]\n    dir = ../elsewhere\n",
            "['remote \"lab\"']\n    url = x\n[cache]\n    dir = {absolute}\n",
            "shared",
        ),
    ],
)
def test_links_into_the_dvc_cache_are_followed_wherever_it_is(
    corpus: SmallCorpus, settings_file: Path, tmp_path: Path, config: str, local: str, cache: str
) -> None:
    dvc = tmp_path / ".dvc"
    dvc.mkdir()
    (dvc / "config").write_text(config)
    (dvc / "config.local").write_text(local.format(absolute=tmp_path / "shared"))
    place = tmp_path / cache / "files" / "md5" / "ab"
    place.mkdir(parents=True)
    file = corpus.folder / "audio" / "a.wav"
    file.rename(place / "cd")
    file.symlink_to(place / "cd")
    assert ingest(corpus, settings_file) == {"added": 2}
    assert ingest(corpus, settings_file) == {"unchanged": 2}
    (tmp_path / "stray.wav").write_bytes(b"no recording of this corpus")
    file.unlink()
    file.symlink_to(tmp_path / "stray.wav")
    assert "a link leads out of the corpus" in run_script("ingest", env_file=settings_file).stderr


def test_dvc_settings_that_cannot_be_read_are_named(corpus: SmallCorpus, settings_file: Path, tmp_path: Path) -> None:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("dir = nowhere\n")
    corpus.write()
    done = run_script("ingest", env_file=settings_file)
    assert done.returncode == 78
    assert str(tmp_path / ".dvc" / "config") in done.stderr


def test_a_writer_that_holds_a_sample_is_waited_for(
    postgres: LocalPostgres, data_factory: str, corpus: SmallCorpus, settings_file: Path, db: Connection
) -> None:
    ingest(corpus, settings_file)
    corpus.set_text("a", "transcript", "crawled again")
    corpus.write()
    with psycopg.connect(postgres.dsn("labelstation", data_factory)) as person:
        person.execute(
            "INSERT INTO transcript_revisions (sample_id, text, source) "
            "SELECT sample_id, 'by hand', 'human' FROM samples WHERE external_id = 'a'"
        )
        with start_script("ingest", env_file=settings_file) as running:
            waits = "SELECT FROM pg_locks WHERE NOT granted"
            eventually(lambda: db.execute(waits).fetchone() is not None, "a wait", 30)
            person.commit()
            assert running.wait(60) == 0
    assert texts(db, "a", "transcript") == ["xin chào", "by hand", "crawled again"]
    assert ledger(db, "a")[3:] == [(2, "transcript"), (3, "transcript")]
