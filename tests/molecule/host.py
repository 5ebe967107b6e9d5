"""A deployed station as a person at the control machine sees it: SSH, the secrets, its address."""

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
HOSTS = Path(os.environ.get("LABELSTATION_TEST_HOSTS", CHECKOUT / ".local/hosts"))
EPHEMERAL = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"])
# In tests/molecule/full/group_vars, encrypted.
VAULTED = "vaulted-for-the-test-1"
# With what the operator's guide encrypts the secrets.
VAULT_PASSWORD_FILE = EPHEMERAL / "vault_password"
SSH_OPTIONS = ("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null")


@dataclass
class Station:
    """A deployed station."""

    name: str
    address: str

    @property
    def full(self) -> bool:
        """Whether every option is on."""
        return self.address.startswith("https:")

    def trust(self) -> None:
        """Let requests believe the station's own certificate."""
        if self.full:
            place = EPHEMERAL / "station.crt"
            place.write_text(self.run("cat /etc/nginx/tls/*.crt"))
            os.environ["REQUESTS_CA_BUNDLE"] = str(place)

    def run(self, command: str, *, given: bytes = b"", ok: tuple[int, ...] = (0,)) -> str:
        """Run a shell command there as root; its stdout."""
        host = json.loads((HOSTS / self.name / "host.json").read_text())
        ssh = [
            "ssh", "-q", "-i", host["identity_file"], "-o", "ConnectTimeout=5", "-o", "ServerAliveInterval=5",
            *SSH_OPTIONS, f"{host['user']}@{host['address']}", "--", f"sudo sh -c {shlex.quote(command)}",
        ]  # fmt: skip
        done = subprocess.run(ssh, input=given, capture_output=True, check=False, timeout=300)
        if done.returncode not in ok:
            raise AssertionError(f"{command}: exit {done.returncode}\n{done.stdout.decode()}\n{done.stderr.decode()}")
        return done.stdout.decode()

    def secret(self, name: str) -> str:
        """A secret as the control machine keeps it."""
        place = EPHEMERAL / "secrets" / name
        text = place.read_text()
        if text.startswith("$ANSIBLE_VAULT;"):
            view = ["ansible-vault", "view", "--vault-password-file", str(VAULT_PASSWORD_FILE), str(place)]
            text = subprocess.run(view, capture_output=True, text=True, check=True).stdout
        return text.strip()

    def secrets(self) -> list[str]:
        """All of them."""
        made = [path.name for path in sorted((EPHEMERAL / "secrets").iterdir()) if path.suffix == ""]
        return [self.secret(name) for name in made] + [VAULTED]


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say what is being looked at and how long that took."""
    started = time.monotonic()
    yield
    print(f"ok   {what} ({time.monotonic() - started:.1f} s)", flush=True)


def wait_until(what: str, condition: Callable[[], bool], seconds: float) -> None:
    """Ask again and again."""
    deadline = time.monotonic() + seconds
    while True:
        if condition():
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds:.0f} s")
        time.sleep(1)


def healthy(station: Station) -> bool:
    """Whether doctor says so."""
    return "FAIL" not in station.run("labelstation doctor", ok=(0, 3))
