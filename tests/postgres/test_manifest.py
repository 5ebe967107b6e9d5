"""What the manifest says, and that it stays as it is."""

import hashlib
import json
from pathlib import Path

from reviews import SEGMENTATION, TRANSLATION, Reviews, document, snapshot
from support import run_script


def export(settings_file: Path, *arguments: str) -> str:
    done = run_script("export", *arguments, env_file=settings_file)
    assert done.returncode == 0, done.stderr
    return done.stdout


def make_manifest(settings_file: Path, *arguments: str) -> bool:
    """Says whether it changed."""
    done = run_script("manifest", "--json", *arguments, env_file=settings_file)
    assert done.returncode == 0, done.stderr
    return bool(json.loads(done.stdout)["changed"])


def lines(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / "manifest.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


def test_a_line_says_what_lies_where_and_where_it_comes_from(
    reviews: Reviews, settings_file: Path, output: Path
) -> None:
    sample_id = reviews.add_sample("clip", b"RIFF 1", duration_seconds=1.25, language_tags=["vi"])
    reviews.crawl(sample_id, "transcript", "source", "vi")
    reviews.review(sample_id, "chào", language="vi")
    reviews.review(sample_id, "hello", TRANSLATION, language="en")
    reviews.review(sample_id, None, SEGMENTATION, segments=[{"start": 0.0, "end": 1.25}])
    export(settings_file)
    transcript, translation, segmentation = lines(output)
    folder = output / str(transcript["folder"])
    assert folder == output / "transcript_verification" / sample_id
    assert transcript["files"] == {file.name: file.stat().st_size for file in folder.iterdir()}
    assert transcript["audio_file_md5"] == hashlib.md5(b"RIFF 1").hexdigest()
    assert (transcript["text"], transcript["language"]) == ("chào", "vi")
    assert (transcript["external_id"], transcript["sample_id"]) == ("clip", sample_id)
    assert (transcript["duration_seconds"], transcript["language_tags"]) == (1.25, ["vi"])
    assert transcript["annotator"] == "annotator-001"
    assert transcript["revision"] == document(folder, "metadata.json")["revision"]
    assert (translation["source_text"], translation["translation"]) == ("chào", "hello")
    assert translation["target_language"] == "en"
    assert segmentation["segments"] == [{"start": 0.0, "end": 1.25}]


def test_lines_are_in_the_order_of_task_type_and_external_id(
    reviews: Reviews, settings_file: Path, output: Path
) -> None:
    for name in ("b", "Á", "a", "Z"):
        sample_id = reviews.add_sample(name)
        reviews.review(sample_id, "dịch", TRANSLATION)
        reviews.review(sample_id)
    export(settings_file)
    order = [(line["task_type"], line["external_id"]) for line in lines(output)]
    names = ["Z", "a", "b", "Á"]
    assert order == [("transcript_correction", name) for name in names] + [
        ("translation_review", name) for name in names
    ]


def test_the_summary_counts_a_sample_once_and_vouches_for_the_lines(
    reviews: Reviews, settings_file: Path, output: Path
) -> None:
    for number in range(10):
        reviews.review(reviews.add_sample(f"clip-{number}", duration_seconds=0.1))
    both = reviews.add_sample("both", duration_seconds=2.0)
    reviews.review(both)
    reviews.review(both, "dịch", TRANSLATION)
    reviews.review(reviews.add_sample("unknown"))
    export(settings_file)
    summary = document(output, "manifest.json")
    content = (output / "manifest.jsonl").read_bytes()
    assert summary["manifest"] == {
        "file": "manifest.jsonl",
        "size_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert (summary["samples"], summary["duration_seconds"]) == (12, 3.0)
    assert summary["task_types"] == {
        "transcript_correction": {"folder": "transcript_verification", "samples": 12, "duration_seconds": 3.0},
        "translation_review": {"folder": "translation_review", "samples": 1, "duration_seconds": 2.0},
        "audio_segmentation": {"folder": "audio_segmentation", "samples": 0, "duration_seconds": 0.0},
    }


def test_when_nothing_changed_the_files_are_not_touched(reviews: Reviews, settings_file: Path, output: Path) -> None:
    reviews.review(reviews.add_sample("clip"))
    assert "manifest: written" in export(settings_file)
    before = {name: (output / name).stat() for name in ("manifest.json", "manifest.jsonl")}
    assert "manifest: unchanged" in export(settings_file)
    assert "manifest: unchanged" in export(settings_file, "--include-exported")
    assert make_manifest(settings_file) is False
    for name, stat in before.items():
        assert (output / name).stat().st_ino == stat.st_ino
        assert (output / name).stat().st_mtime_ns == stat.st_mtime_ns


def test_it_can_be_made_on_its_own_with_the_same_bytes(reviews: Reviews, settings_file: Path, output: Path) -> None:
    reviews.review(reviews.add_sample("clip"))
    assert "manifest" not in export(settings_file, "--no-manifest")
    assert not (output / "manifest.json").exists()
    assert make_manifest(settings_file) is True
    first = snapshot(output)
    (output / "manifest.jsonl").write_text("somebody's edit\n")
    (output / "manifest.json").unlink()
    assert "manifest: written" in export(settings_file)
    assert snapshot(output) == first


def test_it_is_of_one_destination_only(reviews: Reviews, settings_file: Path, tmp_path: Path) -> None:
    reviews.review(reviews.add_sample("a"))
    export(settings_file, "--output-dir", str(tmp_path / "one"))
    reviews.review(reviews.add_sample("b"))
    export(settings_file, "--output-dir", str(tmp_path / "two"))
    assert make_manifest(settings_file, "--output-dir", str(tmp_path / "one")) is False
    assert [line["external_id"] for line in lines(tmp_path / "one")] == ["a"]
    assert [line["external_id"] for line in lines(tmp_path / "two")] == ["a", "b"]


def test_nothing_exported_is_a_manifest_without_lines(reviews: Reviews, settings_file: Path, output: Path) -> None:
    export(settings_file)
    assert (output / "manifest.jsonl").read_bytes() == b""
    assert document(output, "manifest.json")["samples"] == 0


def test_what_a_killed_run_left_beside_is_overwritten(reviews: Reviews, settings_file: Path, output: Path) -> None:
    output.mkdir()
    (output / ".labelstation-manifest.jsonl").write_text("half a li")
    export(settings_file)
    assert not list(output.glob(".*"))


def test_a_manifest_of_a_folder_that_is_not_there_is_refused(settings_file: Path, tmp_path: Path) -> None:
    done = run_script("manifest", "--output-dir", str(tmp_path / "nowhere"), env_file=settings_file)
    assert (done.returncode, done.stdout) == (78, "")
    place = tmp_path / "nowhere"
    assert done.stderr == (
        f"error: there is no folder {place}: run `make export` first, or name another with --output-dir\n"
    )


def test_a_manifest_that_cannot_be_written_is_refused(reviews: Reviews, settings_file: Path, output: Path) -> None:
    (output / "manifest.jsonl").mkdir(parents=True)
    done = run_script("manifest", env_file=settings_file)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (78, "", 1)
    assert done.stderr.startswith(f"error: cannot write {output}/.labelstation-manifest.jsonl: Is a directory: ")
