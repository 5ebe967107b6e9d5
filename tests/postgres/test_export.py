"""What export writes, and when."""

import json
import os
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import pytest

from reviews import SEGMENTATION, TRANSCRIPT, TRANSLATION, Reviews, document, snapshot
from station.local_services import PROJECT, LocalPostgres
from support import run_script, write_settings


def export(settings_file: Path, *arguments: str, expected: int = 0) -> dict[str, object]:
    done = run_script("export", "--json", *arguments, env_file=settings_file)
    assert done.returncode == expected, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


def refusal(settings_file: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and the one line on stderr of a call that is refused."""
    done = run_script("export", *arguments, env_file=settings_file)
    assert done.stdout == ""
    return done.returncode, done.stderr.strip()


def samples_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.exists() else set()


def test_a_reviewed_transcript_becomes_a_folder_with_audio_text_and_where_it_comes_from(
    reviews: Reviews, settings_file: Path, output: Path
) -> None:
    sample_id = reviews.add_sample(
        "clip-1",
        b"RIFF clip 1",
        duration_seconds=2.5,
        language_tags=["vi", "en"],
        title="Buổi sáng",
        dvc_commit_hash="0" * 40,
        transcript_language="vi",
    )
    reviews.crawl(sample_id, "transcript", "xin chao", "vi")
    reviews.review(sample_id, "xin chào")
    assert export(settings_file)["exported"] == 1
    folder = output / "transcript_verification" / sample_id
    assert samples_in(folder) == {"audio.wav", "transcript.json", "metadata.json"}
    assert (folder / "audio.wav").read_bytes() == b"RIFF clip 1"
    transcript = document(folder, "transcript.json")
    revision = transcript.pop("revision")
    assert transcript == {"sample_id": sample_id, "language": "vi", "full_text": "xin chào", "segments": []}
    assert (revision["version"], revision["source"]) == (2, "human")
    metadata = document(folder, "metadata.json")
    assert metadata["external_id"] == "clip-1"
    assert metadata["annotator"] == "annotator-001"
    assert metadata["dvc_commit_hash"] == "0" * 40
    assert metadata["language_tags"] == ["vi", "en"]
    assert metadata["duration_seconds"] == 2.5
    assert metadata["source"]["title"] == "Buổi sáng"
    assert metadata["revision"] == revision
    assert metadata["audio_file_md5"] == reviews.db.execute("SELECT audio_file_md5 FROM samples").fetchall()[0][0]


def test_a_translation_comes_with_the_transcript_that_was_translated(
    reviews: Reviews, settings_file: Path, output: Path
) -> None:
    sample_id = reviews.add_sample("article", audio=None)
    shown = reviews.crawl(sample_id, "transcript", "shown text", "en")
    reviews.crawl(sample_id, "translation", "máy dịch", "vi")
    later = reviews.crawl(sample_id, "transcript", "brought while it was translated", "en")
    task_key = reviews.add_task(sample_id, TRANSLATION)
    for version, since in ((shown, "2 hours"), (later, "-1 hours")):
        reviews.db.execute(
            "INSERT INTO task_showings (task_key, shown_since, sync_version, transcript_version) "
            "VALUES (%s, now() - %s::interval, 1, %s)",
            [task_key, since, version],
        )
    reviews.review(sample_id, "bản dịch", TRANSLATION, task_key=task_key, language="vi")
    export(settings_file)
    folder = output / "translation_review" / sample_id
    assert samples_in(folder) == {"translation.json", "metadata.json"}
    translation = document(folder, "translation.json")
    assert (translation["source_text"], translation["full_text"]) == ("shown text", "bản dịch")
    assert (translation["language"], translation["target_language"]) == ("en", "vi")


def test_a_translation_without_a_known_showing_comes_with_the_transcript_of_its_time(
    reviews: Reviews, settings_file: Path, output: Path
) -> None:
    sample_id = reviews.add_sample("clip")
    reviews.crawl(sample_id, "transcript", "then", "en")
    reviews.review(sample_id, "bản dịch", TRANSLATION)
    reviews.crawl(sample_id, "transcript", "afterwards", "en")
    export(settings_file)
    folder = output / "translation_review" / sample_id
    assert document(folder, "translation.json")["source_text"] == "then"
    assert (folder / "audio.wav").exists()


def test_zero_stays_zero_and_only_what_is_unknown_is_null(reviews: Reviews, settings_file: Path, output: Path) -> None:
    segments = [{"start": 0.0, "end": 0.5, "label": "Silence"}]
    zero = reviews.add_sample("zero", duration_seconds=0.0, cs_ratio=0.0)
    unknown = reviews.add_sample("unknown")
    reviews.review(zero, None, SEGMENTATION, segments=segments)
    reviews.review(unknown, None, SEGMENTATION, segments=[])
    export(settings_file)
    folder = output / "audio_segmentation"
    assert document(folder, zero, "segments.json")["segments"] == segments
    assert '"start": 0.0' in (folder / zero / "segments.json").read_text()
    assert '"duration_seconds": 0.0' in (folder / zero / "metadata.json").read_text()
    assert '"cs_ratio": 0.0' in (folder / zero / "metadata.json").read_text()
    assert '"duration_seconds": null' in (folder / unknown / "metadata.json").read_text()
    lines = [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]
    assert [line["duration_seconds"] for line in lines] == [None, 0.0]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('"quoted" \\ back\nnew line\r\n\ttab', id="quotes and lines"),
        pytest.param("<script>alert('x')</script>&amp;", id="markup"),
        pytest.param("cười 😀 \u2028 \u0085 \x7f", id="emoji and separators"),
        pytest.param("dài " * 25_000, id="100 kB"),
        pytest.param("", id="empty"),
    ],
)
def test_any_text_is_written_as_it_is(reviews: Reviews, settings_file: Path, output: Path, text: str) -> None:
    sample_id = reviews.add_sample("clip")
    reviews.review(sample_id, text)
    export(settings_file)
    assert document(output, "transcript_verification", sample_id, "transcript.json")["full_text"] == text
    (line,) = (output / "manifest.jsonl").read_bytes().split(b"\n")[:-1]
    assert json.loads(line)["text"] == text


def test_text_is_written_in_nfc_even_where_it_entered_otherwise(
    reviews: Reviews, settings_file: Path, output: Path
) -> None:
    # The second line begins with a combining tilde: composed with what JSON writes before it, it would break the file.
    decomposed = unicodedata.normalize("NFD", "Tiếng Việt") + "\n\u0303"
    sample_id = reviews.add_sample("clip", title=decomposed)
    reviews.review(sample_id, decomposed)
    export(settings_file)
    folder = output / "transcript_verification" / sample_id
    composed = "Tiếng Việt\n\u0303"
    assert document(folder, "transcript.json")["full_text"] == composed
    assert document(folder, "metadata.json")["source"]["title"] == composed
    assert json.loads((output / "manifest.jsonl").read_text())["text"] == composed


def test_several_annotations_of_a_sample_make_one_folder_with_the_last_revision(
    reviews: Reviews, settings_file: Path, output: Path
) -> None:
    sample_id = reviews.add_sample("clip")
    task_key = reviews.add_task(sample_id)
    for text in ("first", "second", "third"):
        reviews.review(sample_id, text, task_key=task_key)
    assert export(settings_file)["exported"] == 1
    assert samples_in(output / "transcript_verification") == {sample_id}
    assert document(output, "transcript_verification", sample_id, "transcript.json")["full_text"] == "third"
    assert len((output / "manifest.jsonl").read_text().splitlines()) == 1


def test_the_limit_counts_samples_and_the_next_run_goes_on(reviews: Reviews, settings_file: Path, output: Path) -> None:
    for number in range(3):
        sample_id = reviews.add_sample(f"clip-{number}")
        for text in ("first", "second"):
            reviews.review(sample_id, text)
        reviews.review(sample_id, "dịch", TRANSLATION)
    dry = export(settings_file, "--limit", "2", "--dry-run")
    first = export(settings_file, "--limit", "2")
    assert (first["exported"], first["left"]) == (dry["exported"], dry["left"]) == (4, 1)
    assert len(samples_in(output / "transcript_verification")) == 2
    assert samples_in(output / "transcript_verification") == samples_in(output / "translation_review")
    second = export(settings_file, "--limit", "2")
    assert (second["exported"], second["up_to_date"], second["left"]) == (2, 4, 0)


def test_samples_that_fail_do_not_use_up_the_limit(reviews: Reviews, settings_file: Path) -> None:
    for number in range(4):
        reviews.review(reviews.add_sample(f"clip-{number}"))
    for number in range(2):
        (reviews.raw / f"audio/clip-{number}.wav").unlink()
    result = export(settings_file, "--limit", "2", expected=3)
    assert (result["exported"], result["failed"], result["left"]) == (2, 2, 0)


def test_a_corrected_sample_is_exported_again_and_an_unchanged_one_never(
    reviews: Reviews, settings_file: Path, output: Path
) -> None:
    corrected, unchanged = reviews.add_sample("a"), reviews.add_sample("b")
    reviews.review(corrected, "before")
    reviews.review(unchanged, "the same")
    export(settings_file)
    folder = output / "transcript_verification"
    inode = (folder / unchanged / "transcript.json").stat().st_ino
    reviews.review(corrected, "after")
    result = export(settings_file)
    assert (result["exported"], result["up_to_date"]) == (1, 1)
    assert document(folder, corrected, "transcript.json")["full_text"] == "after"
    assert (folder / unchanged / "transcript.json").stat().st_ino == inode
    before = reviews.db.execute("SELECT * FROM exports ORDER BY sample_id").fetchall()
    assert export(settings_file)["exported"] == 0
    assert reviews.db.execute("SELECT * FROM exports ORDER BY sample_id").fetchall() == before


def test_exporting_all_again_gives_the_same_bytes(reviews: Reviews, settings_file: Path, output: Path) -> None:
    for number in range(3):
        reviews.review(reviews.add_sample(f"clip-{number}", duration_seconds=0.1))
    export(settings_file)
    before = snapshot(output)
    assert export(settings_file, "--include-exported")["exported"] == 3
    assert snapshot(output) == before


def test_texts_that_nobody_reviewed_are_not_exported(reviews: Reviews, settings_file: Path, output: Path) -> None:
    crawled = reviews.add_sample("crawled")
    reviews.crawl(crawled, "transcript", "from the crawler")
    reviews.db.execute("SELECT create_conflict_sample(%s, 'both sides changed')", [crawled])
    gold = reviews.add_sample("gold")
    reviews.crawl(gold, "transcript", "truth")
    gold_id = int(reviews.db.execute("SELECT set_gold_standard(%s)", [gold]).fetchall()[0][0])
    reviews.review(gold, "what the annotator made of gold", task_key=reviews.add_task(gold, gold=gold_id))
    skipped = reviews.add_sample("skipped")
    reviews.add_task(skipped, state="skipped")
    result = export(settings_file)
    assert (result["exported"], result["held_back"]) == (0, {})
    assert samples_in(output / "transcript_verification") == set()


def test_what_a_resolution_decided_is_exported(reviews: Reviews, settings_file: Path, output: Path) -> None:
    sample_id = reviews.add_sample("clip")
    reviews.review(sample_id, "merged", source="resolution")
    reviews.crawl(sample_id, "transcript", "later, from the crawler")
    export(settings_file)
    assert document(output, "transcript_verification", sample_id, "transcript.json")["full_text"] == "merged"


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("conflict", "UPDATE tasks SET state = 'conflict'"),
        ("removed", "UPDATE samples SET removed_at = now()"),
        ("audio_changed", "UPDATE samples SET audio_file_md5 = md5('other audio')"),
    ],
)
def test_what_is_held_back_is_counted_and_keeps_what_was_exported(
    reviews: Reviews, settings_file: Path, output: Path, reason: str, change: str
) -> None:
    exported_before = reviews.add_sample("a")
    reviews.review(exported_before, "good")
    export(settings_file)
    before = snapshot(output)
    reviews.review(exported_before, "corrected")
    reviews.review(reviews.add_sample("b"), "new")
    reviews.db.execute(change.encode())
    result = export(settings_file)
    assert (result["exported"], result["withdrawn"], result["held_back"]) == (0, 0, {reason: 2})
    assert snapshot(output) == before


def test_a_conflict_of_one_task_type_holds_back_only_that(reviews: Reviews, settings_file: Path, output: Path) -> None:
    sample_id = reviews.add_sample("clip")
    reviews.review(sample_id, "text")
    reviews.review(sample_id, "dịch", TRANSLATION)
    reviews.db.execute("UPDATE tasks SET state = 'conflict' WHERE task_type = 'translation_review'")
    result = export(settings_file)
    assert (result["exported"], result["held_back"]) == (1, {"conflict": 1})
    assert samples_in(output / "translation_review") == set()


def test_a_withdrawn_review_is_removed_and_an_earlier_one_comes_back(
    reviews: Reviews, settings_file: Path, output: Path
) -> None:
    alone, twice = reviews.add_sample("alone"), reviews.add_sample("twice")
    reviews.review(twice, "first")
    withdrawn = [reviews.review(alone, "gone"), reviews.review(twice, "gone")]
    export(settings_file)
    reviews.db.execute("UPDATE revisions SET withdrawn_at = now() WHERE revision_id = ANY (%s)", [withdrawn])
    assert export(settings_file, "--dry-run")["withdrawn"] == 1
    assert samples_in(output / "transcript_verification") == {alone, twice}
    result = export(settings_file)
    assert (result["withdrawn"], result["exported"]) == (1, 1)
    assert samples_in(output / "transcript_verification") == {twice}
    assert document(output, "transcript_verification", twice, "transcript.json")["full_text"] == "first"
    assert reviews.db.execute("SELECT sample_id::text FROM exports").fetchall() == [(twice,)]
    assert alone not in (output / "manifest.jsonl").read_text()


def test_a_review_superseded_by_a_conflict_is_not_withdrawn(
    reviews: Reviews, settings_file: Path, output: Path
) -> None:
    sample_id = reviews.add_sample("clip")
    revision_id = reviews.review(sample_id, "before")
    export(settings_file)
    reviews.db.execute("UPDATE revisions SET withdrawn_at = now() WHERE revision_id = %s", [revision_id])
    reviews.db.execute("UPDATE tasks SET state = 'conflict'")
    assert export(settings_file)["held_back"] == {"conflict": 1}
    assert samples_in(output / "transcript_verification") == {sample_id}


def test_folders_that_are_not_ours_are_left_alone(reviews: Reviews, settings_file: Path, output: Path) -> None:
    folder = output / "transcript_verification"
    for name in ("notes", "00000000-0000-4000-8000-000000000000"):
        (folder / name).mkdir(parents=True)
    reviews.review(reviews.add_sample("clip"))
    assert export(settings_file)["withdrawn"] == 0
    assert {"notes", "00000000-0000-4000-8000-000000000000"} < samples_in(folder)


def test_a_folder_that_somebody_deleted_is_written_again(reviews: Reviews, settings_file: Path, output: Path) -> None:
    for number in range(2):
        reviews.review(reviews.add_sample(f"clip-{number}"))
    export(settings_file)
    before = snapshot(output)
    gone = next((output / "transcript_verification").iterdir())
    for file in gone.iterdir():
        file.unlink()
    gone.rmdir()
    result = export(settings_file)
    assert (result["exported"], result["up_to_date"]) == (1, 1)
    assert snapshot(output) == before


def test_a_sample_with_missing_or_wrong_audio_fails_alone_until_the_audio_is_there(
    reviews: Reviews, settings_file: Path, output: Path
) -> None:
    missing, wrong, good, no_file = (reviews.add_sample(name) for name in ("missing", "wrong", "good", "no-file"))
    for sample_id in (missing, wrong, good, no_file):
        reviews.review(sample_id)
    (reviews.raw / "audio/missing.wav").unlink()
    (reviews.raw / "audio/wrong.wav").write_bytes(b"another recording")
    (reviews.raw / "audio/no-file.wav").unlink()
    os.mkfifo(reviews.raw / "audio/no-file.wav")
    done = run_script("export", "--json", env_file=settings_file)
    result = json.loads(done.stdout)
    assert done.returncode == 3
    assert (result["exported"], result["failed"]) == (1, 3)
    errors = done.stderr.splitlines()
    assert errors == [f"error: {failure}" for failure in result["failures"]]
    assert errors[0].startswith("error: transcript_correction missing: cannot read ")
    assert "audio/missing.wav: No such file or directory" in errors[0]
    assert "audio/wrong.wav is not the audio that was reviewed: its md5 is " in errors[1]
    assert errors[2].endswith("audio/no-file.wav is not a file")
    assert samples_in(output / "transcript_verification") == {good}
    assert reviews.db.execute("SELECT sample_id::text FROM exports").fetchall() == [(good,)]
    assert reviews.db.execute("SELECT exit_code FROM runs WHERE script = 'export'").fetchall() == [(3,)]
    (reviews.raw / "audio/no-file.wav").unlink()
    for name in ("missing", "wrong", "no-file"):
        (reviews.raw / f"audio/{name}.wav").write_bytes(b"RIFF")
    result = export(settings_file)
    assert (result["exported"], result["up_to_date"]) == (3, 1)


def test_a_number_that_json_cannot_hold_fails_that_sample_alone(
    reviews: Reviews, settings_file: Path, output: Path
) -> None:
    reviews.review(reviews.add_sample("endless", duration_seconds=float("inf")))
    good = reviews.add_sample("good")
    reviews.review(good)
    assert export(settings_file, expected=3)["failed"] == 1
    assert samples_in(output / "transcript_verification") == {good}


def test_only_write_protected_audio_shares_its_file_with_the_raw_data(
    reviews: Reviews, settings_file: Path, output: Path
) -> None:
    writable, protected = reviews.add_sample("writable"), reviews.add_sample("protected")
    linked = reviews.add_sample("linked", file_name="audio/linked.WAV")
    cached = reviews.raw.parent / "cache"
    (reviews.raw / "audio/linked.WAV").rename(cached)
    (reviews.raw / "audio/linked.WAV").symlink_to(cached)
    for sample_id in (writable, protected, linked):
        reviews.review(sample_id)
    for file in (reviews.raw / "audio/protected.wav", cached):
        file.chmod(0o444)
    export(settings_file)
    folder = output / "transcript_verification"
    assert (folder / protected / "audio.wav").samefile(reviews.raw / "audio/protected.wav")
    assert (folder / linked / "audio.wav").samefile(cached)
    assert not (folder / linked / "audio.wav").is_symlink()
    # What a tool does that rewrites a file in place must not reach the other side.
    with (reviews.raw / "audio/writable.wav").open("r+b") as raw:
        raw.write(b"over")
    assert (folder / writable / "audio.wav").read_bytes() == b"RIFF"


def test_audio_on_another_file_system_is_copied(reviews: Reviews, settings_file: Path, tmp_path: Path) -> None:
    sample_id = reviews.add_sample("clip", b"RIFF" * 100_000)
    reviews.review(sample_id)
    (reviews.raw / "audio/clip.wav").chmod(0o444)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        assert Path(elsewhere).stat().st_dev != tmp_path.stat().st_dev
        export(settings_file, "--output-dir", elsewhere)
        copied = Path(elsewhere) / "transcript_verification" / sample_id / "audio.wav"
        assert copied.read_bytes() == b"RIFF" * 100_000


def test_destinations_do_not_know_of_each_other(reviews: Reviews, settings_file: Path, tmp_path: Path) -> None:
    reviews.review(reviews.add_sample("clip"))
    for name in ("one", "two"):
        assert export(settings_file, "--output-dir", str(tmp_path / name))["exported"] == 1
    assert export(settings_file, "--output-dir", str(tmp_path / "two/../one"))["up_to_date"] == 1
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_one_task_type_leaves_the_others_alone(reviews: Reviews, settings_file: Path, output: Path) -> None:
    sample_id = reviews.add_sample("clip")
    revision_id = reviews.review(sample_id, "text")
    export(settings_file)
    reviews.db.execute("UPDATE revisions SET withdrawn_at = now() WHERE revision_id = %s", [revision_id])
    reviews.review(sample_id, "dịch", TRANSLATION)
    result = export(settings_file, "--task-type", TRANSLATION)
    assert (result["exported"], result["withdrawn"]) == (1, 0)
    assert samples_in(output / "transcript_verification") == {sample_id}
    assert export(settings_file, "--task-type", "transcript_verification")["withdrawn"] == 1
    assert samples_in(output / "translation_review") == {sample_id}


def test_a_dry_run_says_what_a_run_would_do_and_writes_nothing(
    reviews: Reviews, settings_file: Path, output: Path
) -> None:
    reviews.review(reviews.add_sample("clip"))
    assert export(settings_file, "--dry-run")["exported"] == 1
    assert not output.exists()
    assert reviews.db.execute("SELECT count(*) FROM exports").fetchone() == (0,)
    assert reviews.db.execute("SELECT count(*) FROM runs WHERE script = 'export'").fetchone() == (0,)


def test_two_at_once_write_everything_once(reviews: Reviews, settings_file: Path, output: Path) -> None:
    reviews.add_many(700)
    command = [sys.executable, str(PROJECT / "scripts/export.py"), "--env-file", str(settings_file), "--json"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    # The second waits for the first, and gives up when that takes long.
    results = [json.loads(text) for process, text in zip(both, said, strict=True) if process.returncode == 0]
    assert {process.returncode for process in both} in ({0}, {0, 75})
    assert sum(result["exported"] for result in results) == 700
    assert len(samples_in(output / "transcript_verification")) == 700
    assert export(settings_file)["up_to_date"] == 700


def test_a_run_that_finds_another_one_working_ends_with_75(
    reviews: Reviews, settings_file: Path, output: Path, postgres: LocalPostgres, data_factory: str
) -> None:
    reviews.db.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [f"labelstation export to {output}"])
    code, message = refusal(settings_file)
    assert code == 75
    assert message == f"error: another export to {output} is running: wait until it has ended"


def test_an_output_folder_that_cannot_be_written_is_an_error_of_one_line(
    reviews: Reviews, settings_file: Path, tmp_path: Path
) -> None:
    reviews.review(reviews.add_sample("clip"))
    file = tmp_path / "file"
    file.touch()
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "transcript_verification").touch()
    for place, named in (
        (file, file / "transcript_verification"),
        (file / "below", file / "below/transcript_verification"),
        (taken, taken / "transcript_verification"),
    ):
        code, message = refusal(settings_file, "--output-dir", str(place))
        assert (code, message.count("\n")) == (78, 0), message
        assert message.startswith("error: cannot write ")
        assert str(place) in message
        assert named.name in message or str(named.parent) in message
    assert reviews.db.execute("SELECT count(*) FROM exports").fetchone() == (0,)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--task-type", "poetry"], 2, "argument --task-type: 'poetry' is none of transcript_correction, "),
        (["--limit", "0"], 2, "argument --limit: '0' is not a whole number above 0"),
        (["--limit", "many"], 2, "argument --limit: 'many' is not a whole number above 0"),
        (["--output-dir", "raw/out"], 2, "reviewed data may not lie within the raw data: "),
        (["--output-dir", "new\nline"], 2, "the name of the output folder is not readable text: "),
    ],
)
def test_a_wrong_argument_is_refused(
    settings_file: Path, arguments: list[str], code: int, message: str, data_factory: str
) -> None:
    returned, error = refusal(settings_file, *arguments)
    assert returned == code
    assert message in error.splitlines()[-1]


def test_a_raw_folder_that_is_not_there_is_one_error_not_one_for_each_sample(
    reviews: Reviews, settings_file: Path, tmp_path: Path
) -> None:
    for number in range(3):
        reviews.review(reviews.add_sample(f"clip-{number}"))
    reviews.raw.rename(tmp_path / "moved")
    code, message = refusal(settings_file)
    assert code == 78
    assert message == f"error: RAW_DIR: there is no folder {reviews.raw}: it holds the audio"


def test_a_database_without_the_schema_is_refused(postgres: LocalPostgres, tmp_path: Path) -> None:
    settings = write_settings(tmp_path / "settings", DATA_FACTORY_DSN=postgres.dsn("postgres", "postgres"))
    code, message = refusal(settings)
    assert code == 78
    assert message.startswith("error: DATA_FACTORY_DSN: database postgres does not have labelstation's schema")


def test_people_are_told_what_was_done_and_why_not(reviews: Reviews, settings_file: Path, output: Path) -> None:
    reviews.review(reviews.add_sample("a"))
    held_back = reviews.add_sample("b")
    reviews.review(held_back)
    reviews.db.execute("UPDATE samples SET removed_at = now() WHERE sample_id = %s", [held_back])
    done = run_script("export", env_file=settings_file)
    assert done.stdout.splitlines() == [
        "exported: 1",
        "up to date: 0",
        "held back: 1 (removed by the crawler 1)",
        "withdrawn: 0",
        "failed: 0",
        "manifest: written",
        f"in: {output}",
    ]
    counts = reviews.db.execute("SELECT counts FROM runs WHERE script = 'export'").fetchall()[0][0]
    assert (counts["exported"], counts["held_back"]) == (1, {"removed": 1})


def test_the_run_is_recorded_with_its_task_type(reviews: Reviews, settings_file: Path) -> None:
    export(settings_file, "--task-type", TRANSCRIPT)
    runs = reviews.db.execute("SELECT task_type::text, exit_code FROM runs WHERE script = 'export'").fetchall()
    assert runs == [(TRANSCRIPT, 0)]
