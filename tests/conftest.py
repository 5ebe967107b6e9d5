"""The real servers that the tests run against: one PostgreSQL and one Label Studio for the whole run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from station.local_services import LocalPostgres
from support import Connection, run_script, write_settings


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
    yield name
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
