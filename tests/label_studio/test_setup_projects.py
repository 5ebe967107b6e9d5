"""The three projects are made once, kept as the templates say, and never changed at the cost of existing work."""

import shutil
from pathlib import Path
from typing import Any

import psycopg
import pytest

from conftest import Station
from loop import TRANSCRIPT, push, template_result
from station.local_services import PROJECT, LocalPostgres
from support import add_sample, run_script, write_settings


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    """A copy of the labelling interfaces, to change."""
    return Path(shutil.copytree(PROJECT / "label_studio_templates", tmp_path / "templates"))


def edit(templates: Path, task_type: str, *replacements: tuple[str, str]) -> None:
    file = templates / f"{task_type}.xml"
    text = file.read_text(encoding="utf-8")
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    file.write_text(text, encoding="utf-8")


def project_rows(station: Station) -> list[tuple[Any, ...]]:
    """The projects as Label Studio stores them; a row that was only written again differs, too."""
    return station.label_studio_db.execute(
        "SELECT xmin::text, p::text FROM project AS p WHERE id = ANY (%s) ORDER BY id",
        [list(station.projects.values())],
    ).fetchall()


def outcomes(answer: dict[str, Any]) -> set[str]:
    return {entry["outcome"] for entry in answer.values() if isinstance(entry, dict)}


def test_running_it_again_changes_nothing(station: Station, postgres: LocalPostgres) -> None:
    before = project_rows(station)
    assert len(before) == 3
    assert outcomes(station.run("setup_projects", "--dry-run")) == {"unchanged"}
    assert outcomes(station.run("setup_projects")) == {"unchanged"}
    # It was killed when the projects were made and not yet recorded: it finds them again.
    with psycopg.connect(postgres.dsn("postgres", station.db.info.dbname)) as admin:
        admin.execute("DELETE FROM projects")
    answer = station.run("setup_projects")
    assert outcomes(answer) == {"unchanged"}
    assert {name: answer[name]["project"] for name in station.projects} == station.projects
    recorded = station.db.execute("SELECT task_type::text, project_id FROM projects").fetchall()
    assert sorted(recorded) == sorted(station.projects.items())
    assert project_rows(station) == before


def test_what_somebody_changed_in_label_studio_is_repaired(station: Station) -> None:
    project = station.projects[TRANSCRIPT]
    changes = {"title": "Something else", "show_skip_button": False, "maximum_annotations": 3}
    station.admin.call("PATCH", f"/api/projects/{project}/", changes)
    assert station.run("setup_projects", "--dry-run")[TRANSCRIPT]["outcome"] == "to be updated"
    answer = station.run("setup_projects")
    assert answer[TRANSCRIPT]["changed"] == ["show_skip_button", "title"]
    assert answer["translation_review"]["outcome"] == "unchanged"
    found = station.admin.call("GET", f"/api/projects/{project}/")
    assert (found["title"], found["show_skip_button"]) == ("Transcript Correction", True)
    # Changing it would reset every task's own overlap.
    assert found["maximum_annotations"] == 3


def test_a_template_that_would_orphan_work_is_refused(station: Station, templates: Path) -> None:
    for task_type in (TRANSCRIPT, "audio_segmentation"):
        sample_id = add_sample(station.db, task_type)
        station.admin.annotate(push(station, task_type)[sample_id], template_result(task_type))
    before = project_rows(station)
    originals = {file.name: file.read_bytes() for file in templates.glob("*.xml")}
    flags, sound = 'alias="heavy_code_switching"', [('name="audio" value', 'name="sound" value')]
    refused = {
        "control flags (choices of audio, 1 annotation": (TRANSCRIPT, [('name="flags"', 'name="marks"')]),
        "corrected_transcript (textarea of": (TRANSCRIPT, [*sound, ('toName="audio"', 'toName="sound"')]),
        "confidence (rating of audio": (TRANSCRIPT, [("<Rating name=", "<Number name=")]),
        "'heavy_code_switching' of flags": (TRANSCRIPT, [(flags, 'alias="mixed"')]),
        "'English' of segment_labels": ("audio_segmentation", [('value="English"', 'value="Other"')]),
    }
    for told, (task_type, replacements) in refused.items():
        edit(templates, task_type, *replacements)
        answer = station.run("setup_projects", "--templates", str(templates), expect=4)
        assert told in answer["stderr"]
        assert f"{task_type}.xml would orphan existing annotations" in answer["stderr"]
        assert project_rows(station) == before
        for file, content in originals.items():
            (templates / file).write_bytes(content)
    # What no annotation uses can go, and texts can change.
    harmless = [("3. What stands out?", "3. Anything odd?"), ('alias="cut_off"', 'alias="clipped"')]
    edit(templates, TRANSCRIPT, *harmless)
    answer = station.run("setup_projects", "--templates", str(templates))
    assert answer[TRANSCRIPT]["changed"] == ["label_config"]
    assert answer["audio_segmentation"]["outcome"] == "unchanged"


def test_a_wrong_template_is_named_before_anything_is_touched(station: Station, templates: Path) -> None:
    before = project_rows(station)
    file = templates / "transcript_correction.xml"
    original = file.read_text(encoding="utf-8")
    refuses = "Label Studio refuses the template transcript_correction.xml"
    for old, new, told in (
        ("</View>", "", "is not XML"),
        ('name="flags" toName="audio"', 'name="flags" toName="nothing"', refuses),
        ('name="notes"', 'name="flags"', refuses),
        ('name="corrected_transcript"', 'name="transcript"', "has no control named corrected_transcript"),
        ('value="$audio"', 'value="$sound"', "reads sound, which tasks do not have"),
    ):
        edit(templates, TRANSCRIPT, (old, new))
        answer = station.run("setup_projects", "--templates", str(templates), expect=78)
        assert told in answer["stderr"]
        assert "transcript_correction.xml" in answer["stderr"]
        assert project_rows(station) == before
        file.write_text(original, encoding="utf-8")
    file.unlink()
    answer = station.run("setup_projects", "--templates", str(templates), expect=78)
    assert "transcript_correction.xml" in answer["stderr"]


def test_an_existing_project_is_adopted_with_a_personal_access_token(station: Station, tmp_path: Path) -> None:
    station.admin.call("POST", "/api/jwt/settings", {"api_tokens_enabled": True, "legacy_api_tokens_enabled": True})
    token = station.admin.call("POST", "/api/token/")["token"]
    own = station.admin.call("POST", "/api/projects/", {"title": "Our own project"})["id"]
    known = station.env_file.read_text()
    settings = write_settings(tmp_path / "personal.env", LABEL_STUDIO_API_KEY=token, LS_PROJECT_TRANSCRIPT=str(own))
    names = ("LABEL_STUDIO_API_KEY", "LS_PROJECT_TRANSCRIPT")
    settings.write_text(
        settings.read_text() + "".join(line for line in known.splitlines(True) if not line.startswith(names))
    )
    done = run_script("setup_projects", env_file=settings)
    assert done.returncode == 0, done.stderr
    assert f"transcript_correction: project {own} updated" in done.stdout
    assert token not in done.stdout + done.stderr
    assert station.admin.call("GET", f"/api/projects/{own}/")["title"] == "Transcript Correction"
    recorded = station.db.execute("SELECT project_id FROM projects WHERE task_type = %s", [TRANSCRIPT]).fetchone()
    assert recorded == (own,)
    station.admin.call("DELETE", f"/api/projects/{own}/")

    for wrong in (f"{token[:-4]}AAAA", "0" * 40):
        settings.write_text(known.replace(station.token, wrong))
        done = run_script("setup_projects", env_file=settings)
        assert (done.returncode, "LABEL_STUDIO_API_KEY" in done.stderr) == (78, True), done.stderr
        assert wrong not in done.stderr
