"""What doctor sees of a station that is well, and of one that is not."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import Station


@pytest.fixture
def station(shared_station: Station) -> Station:
    shared_station.clear()
    return shared_station


def findings(station: Station, **environment: str) -> dict[str, dict[str, Any]]:
    """Things looked at, by name; the last finding of each."""
    # The tests' PostgreSQL would not survive a power cut, and doctor says so each time.
    result = station.run("doctor", expect=3, **environment)
    assert result["failed"] == sum(one["verdict"] == "FAIL" for one in result["checks"])
    assert all(one["remedy"] for one in result["checks"] if one["verdict"] == "FAIL")
    return {one["thing"]: one for one in result["checks"]}


def test_only_what_is_wrong_fails(station: Station) -> None:
    seen = findings(station)
    for thing in ("Label Studio", "token", "Label Studio's database", "data_factory", "project of audio_segmentation"):
        assert seen[thing]["verdict"] == "OK", seen[thing]
    assert {thing for thing, one in seen.items() if one["verdict"] == "FAIL"} == {"PostgreSQL"}


def test_a_wrong_token_is_named(station: Station) -> None:
    seen = findings(station, LABEL_STUDIO_API_KEY="0123456789abcdef")
    assert seen["Label Studio"]["verdict"] == "FAIL" or seen["token"]["verdict"] == "FAIL"
    assert "LABEL_STUDIO_API_KEY" in str(seen)


def test_a_label_studio_that_is_down_does_not_hide_the_rest(station: Station) -> None:
    seen = findings(station, LABEL_STUDIO_URL="http://127.0.0.1:9")
    assert seen["Label Studio"]["verdict"] == "FAIL"
    assert seen["data_factory"]["verdict"] == "OK"


def test_a_database_that_is_down_does_not_hide_the_rest(station: Station) -> None:
    seen = findings(station, DATA_FACTORY_DSN="host=/nowhere dbname=data_factory user=labelstation")
    assert seen["data_factory"]["verdict"] == "FAIL"
    assert seen["token"]["verdict"] == "OK"


def test_a_project_that_was_changed_is_named(station: Station) -> None:
    project = station.projects["translation_review"]
    title = station.admin.call("GET", f"/api/projects/{project}/")["title"]
    station.admin.call("PATCH", f"/api/projects/{project}/", {"title": "Something else"})
    try:
        assert findings(station)["project of translation_review"]["verdict"] == "WARN"
    finally:
        station.admin.call("PATCH", f"/api/projects/{project}/", {"title": title})


def test_recordings_that_are_missing_are_named(station: Station) -> None:
    station.db.execute(
        "INSERT INTO samples (external_id, source_type, audio_path, audio_file_md5, duration_seconds)"
        " VALUES ('gone', 'manual_upload', 'audio/gone.wav', md5('gone'), 1)"
    )
    assert findings(station)["audio"]["verdict"] == "FAIL"


@pytest.mark.parametrize(("minutes", "verdict"), [(29, "WARN"), (31, "FAIL")])
def test_timers_that_a_deployment_holds_are_no_alarm_until_it_takes_too_long(
    station: Station, tmp_path: Path, minutes: int, verdict: str
) -> None:
    stopped = round((time.monotonic() - minutes * 60) * 1e6)
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "  list-units*timer*) echo labelstation-pull.timer loaded inactive dead ;;\n"
        "  show*labelstation-pull.timer)\n"
        f"    printf 'ActiveState=inactive\\nInactiveEnterTimestampMonotonic={stopped}\\n' ;;\n"
        "esac\n"
    )
    systemctl.chmod(0o755)
    seen = findings(station, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert seen["labelstation-pull"]["verdict"] == verdict
    assert "its timer is inactive" in seen["labelstation-pull"]["found"]
