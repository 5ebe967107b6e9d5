"""Follow docs/operator_guide.md to the letter: what it says runs where it says, on a deployed station."""

import json
import os
import re
import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from host import CHECKOUT, EPHEMERAL, HOSTS, SSH_OPTIONS, VAULT_PASSWORD_FILE, Station

GUIDE = CHECKOUT / "docs/operator_guide.md"
# Inline code that is a command: these go on after the word.
INLINE = re.compile(r"`((?:labelstation|sudo|systemctl) [^`]+)`")
BLOCK = re.compile(r"^```sh (control|station)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """What to type, and where: on the control machine or on the station."""

    section: str
    where: str
    text: str


def commands() -> list[Command]:
    """All of the guide's, in its order."""
    found = []
    for part in re.split(r"^## ", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        section, _, body = part.partition("\n")
        places = [(match.start(), match[1], match[2]) for match in BLOCK.finditer(body)]
        prose = BLOCK.sub(lambda match: " " * len(match[0]), body)
        places += [(match.start(), "station", match[1]) for match in INLINE.finditer(prose)]
        found += [Command(section, where, text.strip()) for _, where, text in sorted(places)]
    return found


@dataclass
class Guide:
    """The guide's commands, and which of them have been followed."""

    station: Station
    waiting: list[Command] = field(default_factory=commands)

    @property
    def lab(self) -> Path:
        """What is inventory/lab in the guide."""
        return EPHEMERAL / "lab"

    def follow(self, section: str, *, count: int | None = None, typed: str | None = None) -> str:
        """Do what a section says, or its next few commands; gives what was printed.

        What is typed answers a question for a password.
        """
        chosen = [command for command in self.waiting if command.section == section][:count]
        assert chosen, f"{GUIDE.name}: section {section} has no command left"
        said = ""
        for command in chosen:
            self.waiting.remove(command)
            if command.where == "control":
                said += self.on_control(command.text)
            elif typed is None:
                said += said_by([*self.ssh(), f"bash -euc {shlex.quote(command.text)}"])
            else:
                self.type_password(command.text, typed)
        return said

    def on_control(self, text: str) -> str:
        """Run it in the checkout, with the names that the guide uses meaning this station."""
        host = self.connection()
        for name, meant in (
            ("inventory/lab", str(self.lab)),
            ("lab@station", f"{host['user']}@{host['address']}"),
            (" raw/ ", " demo/corpus/ "),
            ("~/.labelstation-vault", str(VAULT_PASSWORD_FILE)),
        ):
            text = text.replace(name, meant)
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        return said_by(
            ["bash", "-euc", text],
            env={
                **kept,
                "PATH": f"{self.editor()}:{kept['PATH']}",
                "RSYNC_RSH": shlex.join(["ssh", "-q", "-i", host["identity_file"], *SSH_OPTIONS]),
                # What a careful operator might ask for, and where secrets would show.
                "ANSIBLE_VERBOSITY": "1",
                "ANSIBLE_DIFF_ALWAYS": "1",
                **({"ANSIBLE_VAULT_PASSWORD_FILE": str(VAULT_PASSWORD_FILE)} if VAULT_PASSWORD_FILE.exists() else {}),
            },
        )

    def type_password(self, text: str, typed: str) -> None:
        """Run it there in a terminal, and answer when it asks."""
        ssh = self.ssh()
        ssh.insert(1, "-tt")
        with subprocess.Popen(
            [*ssh, f"bash -euc {shlex.quote(text)}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as asking:
            assert asking.stdin is not None
            assert asking.stdout is not None
            said = b""
            while b"assword:" not in said and (more := os.read(asking.stdout.fileno(), 4096)):
                said += more
            asking.stdin.write(typed.encode() + b"\n")
            asking.stdin.flush()
            said += asking.stdout.read()
        assert asking.returncode == 0, said.decode()

    def ssh(self) -> list[str]:
        """How that user comes in."""
        host = self.connection()
        return ["ssh", "-q", "-i", host["identity_file"], *SSH_OPTIONS, f"{host['user']}@{host['address']}", "--"]

    def connection(self) -> dict[str, str]:
        """What nspawn.py said of the host."""
        known: dict[str, str] = json.loads((HOSTS / self.station.name / "host.json").read_text())
        return known

    def editor(self) -> Path:
        """A folder with an `editor` that writes into the example what a person would, and keeps the secrets known."""
        host = self.connection()
        inventory = yaml.safe_load((CHECKOUT / "inventory/example/hosts.yml").read_text())
        inventory["labelstation"]["hosts"]["station"] = {
            "ansible_host": host["address"],
            "ansible_user": host["user"],
            "ansible_ssh_private_key_file": host["identity_file"],
            "ansible_ssh_common_args": shlex.join(SSH_OPTIONS),
        }
        # This machine's memory is not the station's alone.
        inventory["labelstation"]["vars"] |= {
            "label_studio_address": self.station.address,
            "postgres_memory_megabytes": 2048,
        }
        folder = EPHEMERAL / "editor"
        folder.mkdir(exist_ok=True)
        edited = folder / "hosts.yml"
        edited.write_text(yaml.safe_dump(inventory))
        program = folder / "editor"
        program.write_text(f'#!/bin/sh\ncp {edited} "$1"\nln -sfn {EPHEMERAL}/secrets "$(dirname "$1")/.secrets"\n')
        program.chmod(0o755)
        return folder


def said_by(command: list[str], env: dict[str, str] | None = None) -> str:
    """Run it, and give what it printed; it must succeed."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=CHECKOUT, env=env
    )
    assert done.returncode == 0, f"{command[-1]}: exit {done.returncode}\n{done.stdout[-6000:]}"
    return done.stdout
