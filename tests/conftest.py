"""The real servers that the tests run against: one PostgreSQL and one Label Studio for the whole run."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from dotenv import dotenv_values
from psycopg import sql

from reviews import Reviews
from station.local_annotator import Annotator
from station.local_services import Account, LocalPostgres, Server, free_port, initialise_label_studio, label_studio
from support import Connection, run_script, write_settings

# Whoever runs the tests in the background of a shell has SIGINT ignored, and every process started from here too.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalPostgres]:
    server = LocalPostgres(tmp_path_factory.mktemp("postgres"), durable=False)
    server.start()
    yield server
    server.stop("immediate")


@pytest.fixture(scope="session")
def schema_template(postgres: LocalPostgres, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of a database that has the schema and no data, to copy for each test."""
    env_file = write_settings(
        tmp_path_factory.mktemp("template") / "settings",
        DATA_FACTORY_OWNER_DSN=postgres.dsn("labelstation_owner", "data_factory"),
    )
    done = run_script("migrate", env_file=env_file)
    assert done.returncode == 0, done.stderr
    return "data_factory"


@pytest.fixture
def data_factory(postgres: LocalPostgres, schema_template: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of a data_factory database that only this test uses."""
    with copied_database(postgres, schema_template, f"test_{abs(hash(request.node.nodeid)):x}") as name:
        yield name


@contextmanager
def copied_database(postgres: LocalPostgres, template: str, name: str) -> Iterator[str]:
    """A copy of a database that goes away at the end."""
    with psycopg.connect(postgres.dsn("postgres", "postgres"), autocommit=True) as admin:
        create = sql.SQL("CREATE DATABASE {} TEMPLATE {} OWNER labelstation_owner")
        admin.execute(create.format(sql.Identifier(name), sql.Identifier(template)))
        admin.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO labelstation").format(sql.Identifier(name)))
    try:
        yield name
    finally:
        with psycopg.connect(postgres.dsn("postgres", "postgres"), autocommit=True) as admin:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def settings_file(postgres: LocalPostgres, data_factory: str, tmp_path: Path) -> Path:
    """Settings for scripts that need data_factory only."""
    return write_settings(
        tmp_path / "settings.env",
        DATA_FACTORY_DSN=postgres.dsn("labelstation", data_factory),
        DATA_FACTORY_OWNER_DSN=postgres.dsn("labelstation_owner", data_factory),
        RAW_DIR=str(tmp_path / "raw"),
        REVIEWED_DIR=str(tmp_path / "reviewed"),
    )


@pytest.fixture
def db(postgres: LocalPostgres, data_factory: str) -> Iterator[Connection]:
    """A connection to the test's data_factory as the scripts' role, each statement its own transaction."""
    with psycopg.connect(postgres.dsn("labelstation", data_factory), autocommit=True) as connection:
        yield connection


@dataclass
class RunningLabelStudio:
    """The one Label Studio of the test run."""

    address: str
    account: Account
    server: Server


@pytest.fixture(scope="session")
def running_label_studio(
    postgres: LocalPostgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningLabelStudio]:
    folder = tmp_path_factory.mktemp("label_studio")
    account = initialise_label_studio(folder, postgres)
    server = label_studio(folder, postgres, free_port())
    server.start()
    yield RunningLabelStudio(server.address, account, server)
    server.stop()


@dataclass
class Station:
    """Everything a test of the loop needs: settings, its own projects, both databases, the administrator."""

    env_file: Path
    address: str
    token: str
    projects: dict[str, int]
    db: Connection
    label_studio_db: Connection
    admin: Annotator

    def run(self, script: str, *arguments: str, expect: int = 0, **environment: str) -> dict[str, Any]:
        """Run a script, check its exit code, return its result and what it said on stderr."""
        done = run_script(script, "--json", *arguments, env_file=self.env_file, **environment)
        assert done.returncode == expect, f"{script} {arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        result: dict[str, Any] = json.loads(done.stdout) if done.stdout else {}
        return {**result, "stderr": done.stderr}

    def tasks(self, task_type: str = "transcript_correction") -> dict[str, int]:
        """Tasks that Label Studio has: sample id → task id; fails if a sample has two."""
        rows = self.label_studio_db.execute(
            "SELECT data ->> 'sample_id', id FROM task WHERE project_id = %s", [self.projects[task_type]]
        ).fetchall()
        result: dict[str, int] = dict(rows)
        assert len(result) == len(rows), "a sample has two tasks"
        return result

    def clear(self) -> None:
        """Forget all samples and tasks; the projects stay."""
        with psycopg.connect(self.settings()["DATA_FACTORY_OWNER_DSN"], autocommit=True) as owner:
            owner.execute("TRUNCATE samples, runs, pull_cursors, webhook_events CASCADE")
        self.label_studio_db.execute("TRUNCATE task CASCADE")

    def settings(self) -> dict[str, str]:
        """What the settings file says."""
        return {name: value or "" for name, value in dotenv_values(self.env_file).items()}


@contextmanager
def new_station(
    postgres: LocalPostgres, running_label_studio: RunningLabelStudio, data_factory: str, folder: Path
) -> Iterator[Station]:
    env_file = write_settings(
        folder / "settings.env",
        LABEL_STUDIO_URL=running_label_studio.address,
        LABEL_STUDIO_API_KEY=running_label_studio.account.token,
        LABEL_STUDIO_DSN=postgres.dsn("label_studio_reader", "label_studio"),
        LABEL_STUDIO_OWNER_DSN=postgres.dsn("label_studio", "label_studio"),
        DATA_FACTORY_DSN=postgres.dsn("labelstation", data_factory),
        DATA_FACTORY_OWNER_DSN=postgres.dsn("labelstation_owner", data_factory),
        RAW_DIR=str(folder / "raw"),
        REVIEWED_DIR=str(folder / "reviewed"),
    )
    for script in ("migrate", "setup_projects"):
        done = run_script(script, "--json", env_file=env_file)
        assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    projects = {task_type: int(entry["project"]) for task_type, entry in made.items()}
    admin = Annotator.with_token(running_label_studio.address, running_label_studio.account.token)
    with (
        psycopg.connect(postgres.dsn("labelstation", data_factory), autocommit=True) as db,
        psycopg.connect(postgres.dsn("postgres", "label_studio"), autocommit=True) as label_studio_db,
    ):
        yield Station(
            env_file,
            running_label_studio.address,
            running_label_studio.account.token,
            projects,
            db,
            label_studio_db,
            admin,
        )
    for project_id in projects.values():
        admin.call("DELETE", f"/api/projects/{project_id}/")


@pytest.fixture
def station(
    postgres: LocalPostgres, running_label_studio: RunningLabelStudio, data_factory: str, tmp_path: Path
) -> Iterator[Station]:
    with new_station(postgres, running_label_studio, data_factory, tmp_path) as result:
        yield result


@pytest.fixture(scope="module")
def shared_station(
    postgres: LocalPostgres,
    running_label_studio: RunningLabelStudio,
    schema_template: str,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Station]:
    """One station for all tests of a file, which empty it as they need; making one takes seconds."""
    folder = tmp_path_factory.mktemp("station")
    with (
        copied_database(postgres, schema_template, f"test_{abs(hash(request.node.nodeid)):x}") as data_factory,
        new_station(postgres, running_label_studio, data_factory, folder) as result,
    ):
        yield result


@pytest.fixture
def reviews(db: Connection, tmp_path: Path) -> Reviews:
    """Reviewed samples, as a pull leaves them, and a folder for their audio."""
    (tmp_path / "raw").mkdir()
    return Reviews(db, tmp_path / "raw")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where to export to."""
    return tmp_path / "reviewed"
