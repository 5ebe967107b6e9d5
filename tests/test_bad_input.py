"""Wrong settings, wrong calls, missing services: one line that says what, where and what to do, and its exit code."""

import importlib
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psycopg
import pytest

from conftest import Station, copied_database
from station import cli, contract
from station.local_services import LocalPostgres, free_port
from support import write_settings

Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Run a script as its command line does; returns exit code and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(script: str, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(cli.log, "handlers", [])
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.run(module.parser(), module.main)
        output = capsys.readouterr()
        assert output.out == ""
        return int(ended.value.code or 0), output.err

    return run


def assert_one_line(answer: tuple[int, str], code: int, *fragments: str) -> None:
    exit_code, errors = answer
    assert exit_code == code, errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1, errors
    for fragment in fragments:
        assert fragment in errors


PUSH = ("push", "--task-type", "transcript_correction")


@pytest.mark.parametrize(
    ("name", "value", "fragment"),
    [
        ("LABEL_STUDIO_URL", "localhost:8085", "is not an address such as http://localhost:8085"),
        ("LABEL_STUDIO_URL", "ftp://localhost", "is not an address such as http://localhost:8085"),
        ("LABEL_STUDIO_URL", "https://", "is not an address such as http://localhost:8085"),
        ("AUDIO_SERVER_URL", "audio", "is not an address such as http://localhost:8085"),
        ("LABEL_STUDIO_API_KEY", "to ken", "has characters that no access token has: copy it again"),
        ("LABEL_STUDIO_API_KEY", "tökén", "has characters that no access token has: copy it again"),
        ("LABEL_STUDIO_TIMEOUT_SECONDS", "soon", "valid number"),
        ("LABEL_STUDIO_TIMEOUT_SECONDS", "0", "greater than 0"),
        ("LABEL_STUDIO_TIMEOUT_SECONDS", "nan", "than"),
        ("LS_PROJECT_TRANSCRIPT", "first", "valid integer"),
        ("LS_PROJECT_TRANSLATION", "0", "greater than or equal to 1"),
        ("DATA_FACTORY_DSN", "data_factory", "is not a PostgreSQL connection string such as host="),
        ("LABEL_STUDIO_DSN", "postgresql://u:secret/x@h/d", "is not a PostgreSQL connection string such as host="),
        ("LABEL_STUDIO_DSN", "postgresql://u:secret%x@h/d", "is not a PostgreSQL connection string such as host="),
        ("GOLD_SAMPLE_RATIO", "0.6", "less than or equal to 0.5"),
        ("GOLD_SAMPLE_RATIO", "5%", "valid number"),
        ("SKIP_GOLD_VALIDATION", "perhaps", "valid boolean"),
        ("SYNC_INTERVAL_MINUTES", "0", "greater than or equal to 1"),
    ],
)
def test_a_wrong_setting_is_named_with_its_fault_and_its_place(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, fragment: str
) -> None:
    file = write_settings(tmp_path / "settings.env", **{name: value})
    answer = call(*PUSH, "--env-file", str(file))
    assert_one_line(answer, 78, f"wrong setting: {name} from {file}: ", fragment)
    assert "secret" not in answer[1]
    monkeypatch.setenv(name, value)
    assert_one_line(call(*PUSH), 78, f"wrong setting: {name} from the environment: ", fragment)
    monkeypatch.delenv(name)
    (tmp_path / name).write_text(value + "\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert_one_line(call(*PUSH), 78, f"wrong setting: {name} from the credential {name}: ", fragment)


def test_all_wrong_settings_are_told_at_once(call: Call, tmp_path: Path) -> None:
    write_settings(tmp_path / ".env", GOLD_SAMPLE_RATIO="2", LABEL_STUDIO_URL="here")
    assert_one_line(call(*PUSH), 78, "LABEL_STUDIO_URL from .env: is not", "; GOLD_SAMPLE_RATIO from .env: ")


def test_two_task_types_cannot_have_one_project(call: Call, tmp_path: Path) -> None:
    write_settings(tmp_path / ".env", LS_PROJECT_TRANSCRIPT="3", LS_PROJECT_SEGMENTATION="3")
    assert_one_line(call(*PUSH), 78, "LS_PROJECT_TRANSCRIPT and LS_PROJECT_SEGMENTATION name the same project")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"A=1\nexport\tB=2\nthis is no setting\n", "file, line 3: is not NAME=value: correct that line"),
        (b"LABEL_STUDIO_URL='http://x\n", "file, line 1: is not NAME=value: correct that line"),
        ("LABEL_STUDIO_URL=http://x\n".encode("utf-16"), "file: it is not UTF-8: save it as UTF-8"),
        (None, "there is no settings file"),
    ],
)
def test_an_unusable_settings_file(call: Call, tmp_path: Path, content: bytes | None, fragment: str) -> None:
    file = tmp_path / "file"
    if content is not None:
        file.write_bytes(content)
    assert_one_line(call(*PUSH, "--env-file", str(file)), 78, str(file), fragment)


def test_a_settings_file_from_a_windows_editor_is_read(call: Call, tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"\xef\xbb\xbfGOLD_SAMPLE_RATIO=2\r\n")
    assert_one_line(call(*PUSH), 78, "GOLD_SAMPLE_RATIO from .env: ")


@pytest.mark.parametrize("name", ["DATA_FACTORY_DSN", "LABEL_STUDIO_DSN", "LABEL_STUDIO_API_KEY"])
def test_a_missing_setting_is_named(call: Call, station_settings: dict[str, str], tmp_path: Path, name: str) -> None:
    write_settings(tmp_path / ".env", **{**station_settings, name: ""})
    assert_one_line(call(*PUSH), 78, f"{name} is not set: .env.example says what it is for")


def test_a_task_type_without_a_project(
    call: Call, postgres: LocalPostgres, schema_template: str, station_settings: dict[str, str], tmp_path: Path
) -> None:
    with copied_database(postgres, schema_template, "no_projects") as name:
        dsn = postgres.dsn("labelstation", name)
        write_settings(tmp_path / ".env", **{**station_settings, "DATA_FACTORY_DSN": dsn})
        fragment = "has no Label Studio project: run `make setup-projects` or set LS_PROJECT_TRANSCRIPT"
        assert_one_line(call(*PUSH), 78, fragment)
        assert_one_line(call("pull"), 78, "no Label Studio project is known: run `make setup-projects`")


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("push",), "the following arguments are required: --task-type"),
        (("push", "--task-type", "transcripts"), "'transcripts' is none of transcript_correction, translation_review"),
        ((*PUSH, "--limit", "0"), "'0' is not a whole number above 0"),
        ((*PUSH, "--limit", "-3"), "'-3' is not a whole number above 0"),
        ((*PUSH, "--limit", "ten"), "'ten' is not a whole number above 0"),
        ((*PUSH, "--limit", "1" + 30 * "0"), "is not a whole number above 0"),
        ((*PUSH, "--dry"), "unrecognized arguments: --dry"),
        (("pull", "--since", "yesterday"), "'yesterday' is not a time such as 2026-01-31T12:00"),
        (("migrate", "--rollback", "0"), "'0' is not a whole number above 0"),
        (("setup_projects", "--task-type", ""), "'' is none of transcript_correction"),
    ],
)
def test_a_wrong_call_is_told_with_the_usage(call: Call, arguments: tuple[str, ...], fragment: str) -> None:
    code, errors = call(*arguments)
    assert code == 2
    assert errors.startswith("usage: ")
    assert fragment in errors.splitlines()[-1]


# PostgreSQL


def refused_dsns(postgres: LocalPostgres) -> dict[str, tuple[str, int, str]]:
    """DSN, exit code and fragment by what is wrong."""
    nobody = f"host=127.0.0.1 port={free_port()} dbname=data_factory user=labelstation"
    return {
        "nothing listens": (nobody, 75, "Connection refused; is it running?"),
        "no socket": ("host=/nowhere dbname=x user=y", 75, "No such file or directory; is it running?"),
        "no such host": ("host=postgres.invalid dbname=x user=y", 75, "postgres.invalid"),
        "unknown role": (postgres.dsn("nobody", "data_factory"), 78, 'role "nobody" does not exist: correct'),
        "unknown database": (postgres.dsn("labelstation", "nothing"), 78, 'database "nothing" does not exist: correct'),
        "no right": (postgres.dsn("labelstation", "label_studio"), 78, 'denied for database "label_studio": correct'),
        "no schema": (postgres.dsn("labelstation", "postgres"), 78, "database postgres does not have labelstation's"),
    }


@pytest.mark.parametrize(
    "fault",
    ["nothing listens", "no socket", "no such host", "unknown role", "unknown database", "no right", "no schema"],
)
def test_a_data_factory_that_cannot_be_used(call: Call, postgres: LocalPostgres, tmp_path: Path, fault: str) -> None:
    dsn, code, fragment = refused_dsns(postgres)[fault]
    write_settings(tmp_path / ".env", DATA_FACTORY_DSN=dsn)
    assert_one_line(call(*PUSH), code, "DATA_FACTORY_DSN", fragment)


def test_a_wrong_password(call: Call, postgres: LocalPostgres, tmp_path: Path) -> None:
    rules = postgres.folder / "data" / "pg_hba.conf"
    before = rules.read_text()
    with psycopg.connect(postgres.dsn("postgres", "postgres"), autocommit=True) as admin:
        admin.execute("CREATE ROLE careful LOGIN PASSWORD 'right'")
        rules.write_text("local all careful scram-sha-256\n" + before)
        admin.execute("SELECT pg_reload_conf()")
        try:
            for password, fragment in (("password=wrong", "authentication failed"), ("", "no password supplied")):
                write_settings(
                    tmp_path / ".env", DATA_FACTORY_DSN=f"{postgres.dsn('careful', 'data_factory')} {password}"
                )
                assert_one_line(call(*PUSH), 78, "DATA_FACTORY_DSN", fragment, "correct the setting")
        finally:
            rules.write_text(before)
            admin.execute("SELECT pg_reload_conf()")
            admin.execute("DROP ROLE careful")


# Label Studio


@pytest.fixture
def station_settings(shared_station: Station) -> dict[str, str]:
    """Settings that work."""
    return shared_station.settings()


@pytest.fixture(scope="module")
def label_studio_copy(
    postgres: LocalPostgres, shared_station: Station, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Database of another Label Studio of the same version, whose projects have the same ids and titles."""
    dump = tmp_path_factory.mktemp("dump") / "label_studio.dump"
    postgres.dump("label_studio", dump)
    with psycopg.connect(postgres.dsn("postgres", "postgres"), autocommit=True) as admin:
        admin.execute("CREATE DATABASE another OWNER label_studio")
    postgres.restore("another", dump)
    with psycopg.connect(postgres.dsn("label_studio", "another"), autocommit=True) as connection:
        contract.grant_reader(connection, "label_studio_reader")
    yield "another"
    with psycopg.connect(postgres.dsn("postgres", "postgres"), autocommit=True) as admin:
        admin.execute("DROP DATABASE another WITH (FORCE)")


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (
            "ALTER TABLE task_completion RENAME lead_time TO seconds",
            "task_completion.lead_time is missing or may not be read: run",
        ),
        (
            "ALTER TABLE task ALTER meta TYPE text",
            "task.meta is text, not jsonb: run",
        ),
        (
            "DROP TABLE tasks_tasklock",
            "tasks_tasklock.task_id is missing or may not be read; tasks_tasklock.user_id is missing",
        ),
        (
            "REVOKE SELECT (updated_at) ON task FROM label_studio_reader",
            "task.updated_at is missing or may not be read: run `make migrate`, or go back to the version",
        ),
    ],
)
def test_a_label_studio_that_breaks_the_contract(
    call: Call,
    postgres: LocalPostgres,
    label_studio_copy: str,
    station_settings: dict[str, str],
    tmp_path: Path,
    change: str,
    fragment: str,
) -> None:
    with (
        copied_database(postgres, label_studio_copy, "breaks_contract"),
        psycopg.connect(postgres.dsn("postgres", "breaks_contract"), autocommit=True) as admin,
    ):
        admin.execute(change)
        dsn = postgres.dsn("label_studio_reader", "breaks_contract")
        write_settings(tmp_path / ".env", **{**station_settings, "LABEL_STUDIO_DSN": dsn})
        for script in (PUSH, ("pull",)):
            assert_one_line(call(*script), 78, "LABEL_STUDIO_DSN: database breaks_contract", fragment)


def test_another_label_studio_with_the_same_projects(
    call: Call, postgres: LocalPostgres, label_studio_copy: str, station_settings: dict[str, str], tmp_path: Path
) -> None:
    dsn = postgres.dsn("label_studio_reader", label_studio_copy)
    write_settings(tmp_path / ".env", **{**station_settings, "LABEL_STUDIO_DSN": dsn})
    with psycopg.connect(postgres.dsn("label_studio", label_studio_copy), autocommit=True) as another:
        another.execute("UPDATE project SET created_at = '2020-01-01Z'")
        assert_one_line(
            call(*PUSH), 78, "are two different Label Studios", "the database has 'Transcript Correction' of 2020-01-01"
        )
        another.execute("TRUNCATE project CASCADE")
        assert_one_line(call(*PUSH), 78, "are two different Label Studios", "the database has none: correct")


@pytest.mark.parametrize("database", ["label_studio on SQLite", "another database"])
def test_a_database_without_label_studio(
    call: Call, postgres: LocalPostgres, station_settings: dict[str, str], tmp_path: Path, database: str
) -> None:
    with psycopg.connect(postgres.dsn("postgres", "postgres"), autocommit=True) as admin:
        admin.execute("CREATE DATABASE empty")
    dsn = postgres.dsn("label_studio_reader", "empty") if "SQLite" in database else station_settings["DATA_FACTORY_DSN"]
    write_settings(tmp_path / ".env", **{**station_settings, "LABEL_STUDIO_DSN": dsn})
    assert_one_line(call(*PUSH), 78, "LABEL_STUDIO_DSN: database", "holds no Label Studio", "SQLite", "make migrate")
    with psycopg.connect(postgres.dsn("postgres", "postgres"), autocommit=True) as admin:
        admin.execute("DROP DATABASE empty")


@pytest.mark.parametrize(
    ("settings", "code", "fragment"),
    [
        ({"LABEL_STUDIO_API_KEY": "0" * 40}, 78, "does not accept it: Invalid token"),
        (
            # {"token_type": "refresh"}, signed by nobody
            {"LABEL_STUDIO_API_KEY": "e30.eyJ0b2tlbl90eXBlIjoicmVmcmVzaCJ9.x"},
            78,
            "does not accept this personal access token: Token is invalid",
        ),
        ({"LS_PROJECT_TRANSCRIPT": "99999"}, 78, "has no project 99999 that this account may see: it was deleted, or"),
        ({"LABEL_STUDIO_URL": "http://label-studio.invalid"}, 75, "cannot be reached: nothing answers there"),
        ({"LABEL_STUDIO_URL": "http://127.0.0.1:1"}, 75, "cannot be reached: nothing answers there; is it running?"),
        ({"LABEL_STUDIO_URL": "http://127.0.0.1:99999"}, 78, "LABEL_STUDIO_URL"),
        ({"LABEL_STUDIO_URL": "http://local host"}, 78, "LABEL_STUDIO_URL"),
    ],
)
def test_a_label_studio_that_does_not_let_us_in(
    call: Call, station_settings: dict[str, str], tmp_path: Path, settings: dict[str, str], code: int, fragment: str
) -> None:
    write_settings(tmp_path / ".env", **{**station_settings, **settings})
    assert_one_line(call(*PUSH), code, fragment)


@contextmanager
def something_else(status: int, body: bytes, **headers: str) -> Iterator[str]:
    """A server that gives everything the same answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "headers", "code", "fragment"),
    [
        (200, b"<html>Welcome to nginx!</html>", {}, 78, "is it Label Studio?"),
        (200, b"", {}, 78, "is not Label Studio: correct the address"),
        (200, b'{"up": true}', {}, 78, "is not Label Studio: correct the address"),
        (200, b"[1]", {}, 78, "is not Label Studio: correct the address"),
        (404, b"<html>Not found</html>", {}, 78, "is not Label Studio: correct the address"),
        (301, b"", {"Location": "https://example.org/"}, 78, "redirects to https://example.org/: name the address"),
        (502, b"<html>Bad Gateway</html>", {}, 75, "failed with 502 on GET /api/version"),
    ],
)
def test_something_else_at_the_address(
    call: Call,
    station_settings: dict[str, str],
    tmp_path: Path,
    status: int,
    body: bytes,
    headers: dict[str, str],
    code: int,
    fragment: str,
) -> None:
    with something_else(status, body, **headers) as address:
        write_settings(tmp_path / ".env", **{**station_settings, "LABEL_STUDIO_URL": address})
        assert_one_line(call(*PUSH), code, address, fragment)


def test_an_address_where_nobody_speaks_http(call: Call, station_settings: dict[str, str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        settings = {**station_settings, "LABEL_STUDIO_URL": address, "LABEL_STUDIO_TIMEOUT_SECONDS": "0.2"}
        write_settings(tmp_path / ".env", **settings)
        assert_one_line(call(*PUSH), 75, address, "did not answer GET /api/version within 0.2 s: is it")
