"""The README says the truth: its commands are carried out, its files are there."""

import os
import re
import subprocess
import sys

from conftest import Station
from station.local_services import PROJECT
from station.settings import Settings
from support import add_sample

README = (PROJECT / "README.md").read_text(encoding="utf-8")
TRY_IT, USE_IT, STATION = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
GUIDE = (PROJECT / "docs/operator_guide.md").read_text(encoding="utf-8")


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", f"PY={sys.executable}", *arguments],
        cwd=PROJECT,
        env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_daily_commands_do_what_the_readme_says(station: Station) -> None:
    printed = {}
    for line in USE_IT.splitlines():
        done = make(*line.split()[1:], ENV_FILE=str(station.env_file))
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        printed[line] = done.stdout
    assert len(printed) == 7
    assert (
        "would push 29 transcript_correction tasks"
        in printed["make push TASK=transcript_correction LIMIT=50 DRY_RUN=1"]
    )
    assert len(station.tasks()) == 29


def test_every_target_named_exists_and_make_alone_lists_them() -> None:
    listed = set(re.findall(r"^  make ([a-z-]+) ", make().stdout, re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z][a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test", "push", "demo-stop"} <= named
    assert named <= listed
    assert [line.split()[1] for line in TRY_IT.splitlines()] == ["demo", "test"]


def test_the_commands_for_a_station_are_those_that_the_deployed_station_is_tested_with() -> None:
    """tests/molecule/guide.py follows every command of the guide."""

    def lines(text: str) -> list[str]:
        return [" ".join(line.partition("#")[0].split()) for line in text.splitlines()]

    assert "make deploy INVENTORY=inventory/lab" in lines(STATION)
    assert set(lines(STATION)) <= set(lines("".join(re.findall(r"```sh control\n(.*?)```", GUIDE, re.DOTALL))))


def test_no_command_of_the_guide_is_one_that_nobody_follows() -> None:
    assert not re.findall(r"```(?!sh control\n|sh station\n|\n)", GUIDE)
    assert "\n    " not in re.sub(r"```.*?```", "", GUIDE, flags=re.DOTALL), "an indented block"


def test_a_script_its_target_and_its_settings_have_one_name() -> None:
    listed = set(re.findall(r"^  make ([a-z-]+) ", make().stdout, re.MULTILINE))
    assert {file.stem.replace("_", "-") for file in (PROJECT / "scripts").glob("*.py")} <= listed
    explained = re.findall(r"^([A-Z_]+)=", (PROJECT / ".env.example").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(explained) == sorted(name.upper() for name in Settings.model_fields)


def test_every_file_that_is_pointed_to_is_there() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (PROJECT / target).exists(), target


def test_every_query_in_the_description_of_the_data_runs(station: Station) -> None:
    page = (PROJECT / "docs" / "data.md").read_text(encoding="utf-8")
    functions, label_studio = re.findall(r"```sql\n(.*?)```", page, re.DOTALL)
    sample_id = add_sample(station.db, "a")
    for statement in re.sub(r"--.*", "", functions).replace("'…'", f"'{sample_id}'").split(";")[:-1]:
        station.db.execute(statement)
    for statement in label_studio.split(";")[:-1]:
        assert station.label_studio_db.execute(statement).description
