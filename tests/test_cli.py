"""What all scripts have in common: help, exit codes of signals, output for machines and for journald."""

import importlib
import json
import re
import runpy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from station.local_services import PROJECT, LocalPostgres
from support import eventually, finish, launch_script, run_script, write_settings

SCRIPTS = sorted(file.stem for file in (PROJECT / "scripts").glob("*.py"))


@pytest.fixture(scope="module")
def commands() -> dict[str, Any]:
    """The generator of docs/commands.md."""
    return runpy.run_path(str(PROJECT / "docs" / "make_commands.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_a_page_and_names_every_option(commands: dict[str, Any], script: str) -> None:
    help_of: Callable[[str], str] = commands["help_of"]
    told = help_of(script)
    assert max(len(line) for line in told.splitlines()) <= 100
    for action in importlib.import_module(script).parser()._actions:
        assert action.help, f"{action.dest} is not explained"
        assert all(name in told for name in action.option_strings)


def test_the_page_of_commands_is_what_the_scripts_say(commands: dict[str, Any]) -> None:
    page = (PROJECT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"<!-- help of (\w+) -->", page)) == SCRIPTS
    assert commands["updated"](page) == page, "run docs/make_commands.py"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_script_with_its_code(
    postgres: LocalPostgres, data_factory: str, settings_file: Path, number: signal.Signals, code: int
) -> None:
    with psycopg.connect(postgres.dsn("labelstation_owner", data_factory), autocommit=True) as somebody:
        somebody.execute("SELECT pg_advisory_lock(hashtextextended('labelstation migrate', 0))")
        running = launch_script("migrate", env_file=settings_file)
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'advisory' AND datname = current_database()"
        eventually(lambda: somebody.execute(waits).fetchone() == (1,), "the script waits")
        running.send_signal(number)
        assert finish(running, expect=code) == ("", "")
        eventually(lambda: somebody.execute(waits).fetchone() == (0,), "the server has stopped waiting, too")


def test_journald_gets_priorities(tmp_path: Path) -> None:
    file = write_settings(tmp_path / ".env", DATA_FACTORY_OWNER_DSN="host=/nowhere")
    done = run_script("migrate", env_file=file, JOURNAL_STREAM="8:1234")
    assert done.returncode == 75
    assert done.stderr.startswith("<3>PostgreSQL does not answer at DATA_FACTORY_OWNER_DSN")


def test_the_result_for_machines_is_one_document_and_nothing_else(settings_file: Path) -> None:
    done = run_script("migrate", "--json", "--verbose", env_file=settings_file)
    assert json.loads(done.stdout) == {"dry_run": False, "applied": [], "reader_granted": False}
    failed = run_script("push", "--json", "--task-type", "translation_review", env_file=settings_file)
    assert (failed.returncode, failed.stdout) == (78, "")


def test_a_reader_who_leaves_early_is_no_error(settings_file: Path) -> None:
    running = launch_script("migrate", env_file=settings_file)
    assert running.stdout is not None
    running.stdout.close()
    running.stdout = None
    assert finish(running)[1] == ""
