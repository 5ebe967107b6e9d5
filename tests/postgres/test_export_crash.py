"""Export killed at any instant and run again ends as if it had never been killed."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psycopg

from reviews import Reviews, snapshot
from station.local_services import PROJECT, LocalPostgres
from support import Connection, RandomKills, eventually, run_script, start_script

# Runs export in batches of two and kills it just before the nth thing of some kinds that it does below the output
# folder. A run that gets to its end says on stderr how many there were.
KILLED_BEFORE = """
import os, signal, sys
scripts, output, kinds, last = sys.argv[1:5]
del sys.argv[1:5]
sys.path.insert(0, scripts)
import export
from station import cli
seen = 0
def count(event, arguments):
    global seen
    if event in kinds.split(",") and output in str(arguments):
        seen += 1
        if seen == int(last):
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
export.BATCH_SAMPLES = 2
try:
    cli.run(export.parser(), export.main)
finally:
    print(seen, file=sys.stderr)
"""
EVERYTHING = ["open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "shutil.rmtree"]


def export_killed_before(
    settings_file: Path, output: Path, kinds: Sequence[str], last: int
) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", KILLED_BEFORE, str(PROJECT / "scripts"), str(output), ",".join(kinds), str(last)]
    return subprocess.run(
        [*program, "--env-file", str(settings_file)], capture_output=True, text=True, check=False, timeout=120
    )


def whole_folders(output: Path) -> set[str]:
    """The samples that a reader sees; fails if one is not whole."""
    folder = output / "transcript_verification"
    seen = {path for path in folder.iterdir() if not path.name.startswith(".")} if folder.exists() else set()
    for path in seen:
        assert {file.name for file in path.iterdir()} == {"audio.wav", "metadata.json", "transcript.json"}
    return {path.name for path in seen}


def rows(db: Connection) -> list[tuple[object, ...]]:
    return db.execute("SELECT task_type::text, sample_id, revision_id, entry FROM exports ORDER BY 1, 2").fetchall()


def test_killed_before_anything_it_does_to_files_it_ends_in_the_same_state(
    reviews: Reviews, settings_file: Path, output: Path
) -> None:
    withdrawn = [reviews.review(reviews.add_sample(f"withdrawn-{number}")) for number in range(3)]
    corrected = [reviews.add_sample(f"corrected-{number}") for number in range(3)]
    for sample_id in [*corrected, reviews.add_sample("unchanged")]:
        reviews.review(sample_id, "before")
    assert run_script("export", env_file=settings_file).returncode == 0
    for sample_id in [*corrected, reviews.add_sample("new")]:
        reviews.review(sample_id, "after")
    reviews.review(reviews.add_sample("missing"))
    (reviews.raw / "audio/missing.wav").unlink()
    reviews.db.execute("UPDATE revisions SET withdrawn_at = now() WHERE revision_id = ANY (%s)", [withdrawn])
    reviews.db.execute("CREATE TEMP TABLE exports_before AS SELECT * FROM exports")
    before = output.with_name("before")
    shutil.copytree(output, before)

    never_killed = export_killed_before(settings_file, output, EVERYTHING, 0)
    assert never_killed.returncode == 3, never_killed.stderr
    reference = snapshot(output), rows(reviews.db)
    instants = int(never_killed.stderr.splitlines()[-1])
    assert len(whole_folders(output)) == 5
    for instant in range(1, instants + 1, max(1, instants // 30)):
        shutil.rmtree(output)
        shutil.copytree(before, output)
        reviews.db.execute("DELETE FROM exports")
        reviews.db.execute("INSERT INTO exports SELECT * FROM exports_before")
        killed = export_killed_before(settings_file, output, EVERYTHING, instant)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        whole_folders(output)
        again = run_script("export", env_file=settings_file)
        assert again.returncode == 3, again.stderr
        assert (snapshot(output), rows(reviews.db)) == reference, f"killed before step {instant} of {instants}"


def test_killed_between_writing_a_folder_and_its_rename_no_reader_sees_it(
    reviews: Reviews, settings_file: Path, output: Path
) -> None:
    for number in range(2):
        reviews.review(reviews.add_sample(f"clip-{number}"))
    for renamed in range(2):
        killed = export_killed_before(settings_file, output, ["os.rename"], renamed + 1)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        unfinished = list((output / "transcript_verification").glob(".*/*/metadata.json"))
        assert len(unfinished) == 2 - renamed
        assert len(whole_folders(output)) == renamed
        assert rows(reviews.db) == []
    assert run_script("export", env_file=settings_file).returncode == 0
    assert len(whole_folders(output)) == len(rows(reviews.db)) == 2
    assert not list(output.rglob(".*"))


def test_killed_between_rename_and_record_it_writes_the_same_folders_again(
    reviews: Reviews, settings_file: Path, output: Path, postgres: LocalPostgres, data_factory: str
) -> None:
    for number in range(3):
        reviews.review(reviews.add_sample(f"clip-{number}"))
    command = [sys.executable, str(PROJECT / "scripts/export.py"), "--env-file", str(settings_file)]
    with psycopg.connect(postgres.dsn("labelstation", data_factory)) as other:
        # Others may read the table, so that export plans; it waits where it records.
        other.execute("LOCK TABLE exports IN SHARE MODE")
        process = subprocess.Popen(command)
        eventually(lambda: waits_for_a_lock(reviews.db), "an export that waits")
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
    seen = whole_folders(output)
    before = {path: content for path, content in snapshot(output).items() if "/." not in path}
    assert (len(seen), rows(reviews.db)) == (3, [])
    assert run_script("export", "--no-manifest", env_file=settings_file).returncode == 0
    assert snapshot(output) == before
    assert len(rows(reviews.db)) == 3


def waits_for_a_lock(db: Connection) -> bool:
    return (
        db.execute(
            "SELECT FROM pg_stat_activity WHERE application_name = 'labelstation-export' AND wait_event_type = 'Lock' "
            "AND datname = current_database()"
        ).fetchall()
        != []
    )


def test_what_was_withdrawn_after_its_folder_was_written_but_not_recorded_is_removed(
    reviews: Reviews, settings_file: Path, output: Path
) -> None:
    revision_id = reviews.review(reviews.add_sample("clip"))
    assert run_script("export", env_file=settings_file).returncode == 0
    reviews.db.execute("DELETE FROM exports")
    reviews.db.execute("UPDATE revisions SET withdrawn_at = now() WHERE revision_id = %s", [revision_id])
    assert run_script("export", env_file=settings_file).returncode == 0
    assert whole_folders(output) == set()


def test_killed_at_random_it_leaves_only_whole_folders_and_the_next_run_completes_them(
    reviews: Reviews, settings_file: Path, output: Path
) -> None:
    reviews.add_many(1200)
    assert run_script("export", env_file=settings_file).returncode == 0
    reference = snapshot(output)
    kills = RandomKills(reviews.db, seed=20, longest=1.5)
    while kills.number < 8:
        destination = output.with_name("killed")
        with start_script("export", "--output-dir", str(destination), env_file=settings_file) as process:
            kills.strike(process)
        recorded = reviews.db.execute(
            "SELECT sample_id::text FROM exports WHERE destination = %s", [str(destination)]
        ).fetchall()
        assert {sample_id for (sample_id,) in recorded} <= whole_folders(destination)
        again = run_script("export", "--output-dir", str(destination), env_file=settings_file)
        assert again.returncode == 0, again.stderr
        assert snapshot(destination) == reference
        shutil.rmtree(destination)
        reviews.db.execute("DELETE FROM exports WHERE destination = %s", [str(destination)])
