"""What every role keeps to, so that its README is enough to use it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]
ROLES = sorted(path.name for path in (PROJECT / "roles").iterdir() if path.is_dir())
ORDER = ["preflight", "install", "configure", "run"]


def load(role: str, file: str) -> Any:
    """A YAML file of a role; empty when it is not there."""
    path = PROJECT / "roles" / role / file
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}


def options(role: str) -> dict[str, Any]:
    result: dict[str, Any] = load(role, "meta/argument_specs.yml")["argument_specs"]["main"]["options"]
    return result


@pytest.mark.parametrize("role", ROLES)
def test_defaults_and_argument_specs_say_the_same(role: str) -> None:
    stated = {name: entry["default"] for name, entry in options(role).items() if "default" in entry}
    assert load(role, "defaults/main.yml") == stated


@pytest.mark.parametrize("role", ROLES)
def test_an_option_has_a_default_or_is_required(role: str) -> None:
    for name, entry in options(role).items():
        assert ("default" in entry) != bool(entry.get("required")), name


@pytest.mark.parametrize("role", ROLES)
def test_names_begin_with_the_role(role: str) -> None:
    assert all(name.startswith(f"{role}_") for name in options(role))
    assert all(name.startswith(f"__{role}_") for name in load(role, "vars/main.yml") or {})


@pytest.mark.parametrize("role", ROLES)
def test_no_default_is_a_secret_or_a_version(role: str) -> None:
    for name, value in load(role, "defaults/main.yml").items():
        assert not name.endswith("_version"), name
        if re.search("password|token|secret_key|webhook_url|ping_url", name):
            assert value == "", name


@pytest.mark.parametrize("role", ROLES)
def test_the_readme_explains_every_option(role: str) -> None:
    readme = (PROJECT / "roles" / role / "README.md").read_text(encoding="utf-8")
    assert [name for name in options(role) if f"`{name}`" not in readme] == []


@pytest.mark.parametrize("role", ROLES)
def test_tasks_are_preflight_install_configure_run(role: str) -> None:
    tasks = load(role, "tasks/main.yml")
    files = [Path(str(task["ansible.builtin.import_tasks"])).stem for task in tasks]
    phases = [name for name in files if name in ORDER]
    assert phases == sorted(phases, key=ORDER.index)
    assert phases[0] == "preflight"


def test_the_example_names_only_what_roles_know() -> None:
    example = yaml.safe_load((PROJECT / "inventory/example/hosts.yml").read_text(encoding="utf-8"))
    known = {name: entry for role in ROLES for name, entry in options(role).items()}
    given = example["labelstation"]["vars"]
    assert given.keys() <= known.keys()
    assert {
        name for name, entry in known.items() if entry.get("required") and not name.startswith("virtualenv_")
    } <= given.keys()


def test_every_timer_is_named_after_its_script() -> None:
    for job in load("timer_job", "defaults/main.yml")["timer_job_jobs"]:
        assert job["name"].startswith(job["script"]), job
        assert (PROJECT / "scripts" / f"{job['script']}.py").exists(), job


def test_lock_files_name_no_index() -> None:
    for file in (PROJECT / "requirements").glob("*.txt"):
        assert "://" not in file.read_text(encoding="utf-8"), file.name
