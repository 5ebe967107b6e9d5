#!/usr/bin/env python3
"""Test hosts for molecule: a bare Debian server in systemd-nspawn, reached over SSH.

    nspawn.py create NAME --release bookworm     prints the host's connection as JSON
    nspawn.py destroy NAME

A host is a root tree made once by mmdebstrap and cached, with an overlay of its own on top, a real
systemd, a network namespace of its own (a veth pair towards this machine, slirp4netns towards the
package registries: nothing in this machine's own network is changed), and a user `lab` who may
use sudo. apt and pip inside it use what this machine's own configuration says.

Root is needed. Directories: LABELSTATION_TEST_CACHE (default .local/cache) keeps root trees and
downloaded packages; LABELSTATION_TEST_HOSTS (default .local/hosts) the running hosts.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("LABELSTATION_TEST_CACHE", CHECKOUT / ".local/cache")).resolve()
HOSTS = Path(os.environ.get("LABELSTATION_TEST_HOSTS", CHECKOUT / ".local/hosts")).resolve()
RELEASES = ("bookworm", "trixie")
PROGRAMS = ("mmdebstrap", "systemd-nspawn", "slirp4netns", "ip", "ssh-keygen", "mount")
# What a lab's server has before anyone has heard of this project.
PACKAGES = (
    "ca-certificates",
    "dbus",
    "iproute2",
    "libpam-systemd",
    "netbase",
    "openssh-server",
    "procps",
    "python3",
    "python3-apt",
    "sudo",
    "systemd-sysv",
)
USER = "lab"
BOOT_SECONDS = 90
# What systemd-nspawn with --keep-unit exits with when the host wants to reboot.
REBOOT = 133
STOP_SECONDS = 60


def run(*command: str | Path) -> str:
    """Run a command and give its output; its errors end the program with what it said."""
    done = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def apt_sources(release: str) -> list[str]:
    """This machine's own Debian archives, for another release of Debian."""
    own = os.environ.get("LABELSTATION_TEST_OWN_RELEASE") or own_release()
    lines: dict[str, None] = {}
    targets = run(
        "apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)",
        "Created-By: Packages",
    )  # fmt: skip
    for target in targets.splitlines():
        uri, suite, component = target.split()
        if suite == own or suite.startswith(f"{own}-"):
            lines[f"deb {uri} {release}{suite.removeprefix(own)} {component}"] = None
    if not lines:
        sys.exit(f"apt's sources name no archive for {own}: nothing to make a {release} host from")
    return list(lines)


def own_release() -> str:
    """The code name of the Debian that this machine runs."""
    for line in Path("/etc/os-release").read_text().splitlines():
        key, _, value = line.partition("=")
        if key == "VERSION_CODENAME":
            return value.strip('"')
    sys.exit("/etc/os-release names no VERSION_CODENAME: is this Debian?")


def apt_settings() -> str:
    """How this machine reaches its archives (proxies, validity checks), in apt's own format."""
    wanted = ("Acquire::Check-", "Acquire::http", "Acquire::https", "Acquire::Retries")
    dump = run("apt-config", "dump").splitlines()
    return "".join(f"{line}\n" for line in dump if line.startswith(wanted))


def pip_settings() -> str:
    """How this machine reaches its package index, without what lies only on its own disk."""
    wanted = ("index-url", "extra-index-url", "trusted-host", "proxy", "cert", "timeout")
    found: dict[str, str] = {}
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=False, capture_output=True, text=True
    )
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2].removeprefix("default-")
        value = " ".join(part for part in value.strip("'").split() if not part.startswith("file:"))
        if name in wanted and value:
            found[name] = value
    return "[global]\n" + "".join(f"{name} = {value}\n" for name, value in found.items())


def root_tree(release: str) -> Path:
    """The cached root tree of a bare host; made when it is not there yet."""
    sources, settings, pip = apt_sources(release), apt_settings(), pip_settings()
    authorities = sorted(Path("/usr/local/share/ca-certificates").glob("*.crt"))
    recipe = [*sources, settings, pip, *PACKAGES, *(path.read_text() for path in authorities)]
    digest = hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:12]
    tree = CACHE / f"root-{release}-{digest}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"root-{release}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if tree.exists():
            return tree
        print(f"making the root tree of a bare {release} host (once)", file=sys.stderr)
        unfinished = CACHE / f"unfinished-{release}"
        shutil.rmtree(unfinished, ignore_errors=True)
        settings_file = CACHE / f"apt-{release}.conf"
        settings_file.write_text(settings)
        command: list[str | Path] = [
            "mmdebstrap", "--variant=apt", "--mode=root", "--skip=cleanup/apt/lists", f"--include={','.join(PACKAGES)}",
            f"--aptopt={settings_file}", release, unfinished, *sources,
        ]  # fmt: skip
        run(*command)
        (unfinished / "etc/pip.conf").write_text(pip)
        for path in authorities:
            shutil.copy(path, unfinished / "usr/local/share/ca-certificates" / path.name)
        run("chroot", unfinished, "update-ca-certificates")
        run("chroot", unfinished, "useradd", "--create-home", "--shell", "/bin/bash", USER)
        sudoers = unfinished / "etc/sudoers.d" / USER
        sudoers.write_text(f"{USER} ALL=(ALL) NOPASSWD: ALL\n")
        sudoers.chmod(0o440)
        (unfinished / "etc/machine-id").write_text("")
        unfinished.rename(tree)
    return tree


def free_network() -> int:
    """A number from 1 to 250 whose 10.77.<number>.0/30 no interface of this machine uses."""
    taken = run("ip", "-4", "-brief", "address")
    for number in range(1, 251):
        if f"10.77.{number}." not in taken:
            return number
    sys.exit("250 test hosts run on this machine already")


def connect_network(name: str, place: Path) -> str:
    """Give the host its network namespace; returns the address it is reached at."""
    with (HOSTS / "network.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        number = free_network()
        ours, theirs = f"ls{number}", f"10.77.{number}.2"
        run("ip", "netns", "add", name)
        run("ip", "link", "add", ours, "type", "veth", "peer", "name", "lan0", "netns", name)
        run("ip", "address", "add", f"10.77.{number}.1/30", "dev", ours)
        run("ip", "link", "set", ours, "up")
    for command in (
        f"address add {theirs}/30 dev lan0",
        "link set lan0 up",
        "link set lo up",
    ):
        run("ip", "-netns", name, *command.split())
    with (place / "slirp.log").open("w") as log:
        slirp = subprocess.Popen(
            ["slirp4netns", "--configure", "--mtu=1500", "--disable-host-loopback",
             "--netns-type=path", f"/run/netns/{name}", "wan0"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    (place / "slirp.pid").write_text(str(slirp.pid))
    return theirs


def boot(name: str, place: Path, release: str) -> None:
    """Start systemd inside the host, and somebody who starts it again when the host reboots."""
    with (place / "console.log").open("w") as log:
        supervisor = subprocess.Popen(
            [sys.executable, __file__, "supervise", name, "--release", release],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (place / "supervisor.pid").write_text(str(supervisor.pid))


def control_groups(name: str) -> list[Path]:
    """Control groups of a host's own, in the hierarchies that systemd uses.

    Without them two hosts would share groups by the name of their services, and each would take the other's away.
    """
    mounted = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup/systemd"), Path("/sys/fs/cgroup"))
    return [place / f"labelstation-{name}" for place in mounted if (place / "cgroup.procs").exists()]


def supervise(name: str, release: str) -> int:
    """Run systemd-nspawn until the host is switched off; a reboot ends it and starts it anew."""
    place = HOSTS / name
    for group in control_groups(name):
        group.mkdir(exist_ok=True)
        (group / "cgroup.procs").write_text(str(os.getpid()))
    archives, wheels = CACHE / f"apt-{release}", CACHE / "pip"
    (archives / "partial").mkdir(parents=True, exist_ok=True)
    wheels.mkdir(parents=True, exist_ok=True)
    command: list[str | Path] = [
        "systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot", "--capability=CAP_NET_ADMIN",
        f"--machine={name}", f"--directory={place / 'root'}", f"--network-namespace-path=/run/netns/{name}",
        "--resolv-conf=copy-host", "--timezone=off", "--link-journal=no", "--console=pipe",
        f"--bind={archives}:/var/cache/apt/archives", f"--bind={wheels}:/root/.cache/pip",
    ]  # fmt: skip
    stopping = False
    while True:
        # A machine with the legacy cgroup hierarchy boots Debian 13 only when told to use the new one.
        nspawn = subprocess.Popen(command, env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"})

        def stop_host(*_signal: object, nspawn: subprocess.Popen[bytes] = nspawn) -> None:
            nonlocal stopping
            stopping = True
            nspawn.terminate()

        signal.signal(signal.SIGTERM, stop_host)
        code = nspawn.wait()
        if stopping or code != REBOOT:
            return code


def wait_for_ssh(address: str, place: Path) -> None:
    """Return when the host's SSH server has said its name."""
    deadline = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((address, 22), timeout=2) as connection:
                if connection.recv(64).startswith(b"SSH-"):
                    return
        except OSError:
            time.sleep(0.2)
    console = (place / "console.log").read_text(errors="replace")[-4000:]
    sys.exit(f"no SSH at {address} after {BOOT_SECONDS} s; the host's console said:\n{console}")


def create(name: str, release: str) -> dict[str, object]:
    """Make and boot a host; an existing one of that name is given as it is."""
    place = HOSTS / name
    described = place / "host.json"
    if described.exists():
        found: dict[str, object] = json.loads(described.read_text())
        return found
    destroy(name)
    tree = root_tree(release)
    for folder in ("upper", "work", "root"):
        (place / folder).mkdir(parents=True)
    run("mount", "-t", "overlay", "overlay", "-o",
        f"lowerdir={tree},upperdir={place / 'upper'},workdir={place / 'work'}", place / "root")  # fmt: skip
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "molecule", "-f", place / "key")
    keys = place / "root/home" / USER / ".ssh"
    keys.mkdir(mode=0o700)
    shutil.copy(place / "key.pub", keys / "authorized_keys")
    run("chroot", place / "root", "chown", "-R", f"{USER}:{USER}", f"/home/{USER}/.ssh")
    (place / "root/etc/hostname").write_text(f"{name}\n")
    (place / "root/etc/hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n::1 localhost\n")
    address = connect_network(name, place)
    boot(name, place, release)
    wait_for_ssh(address, place)
    host: dict[str, object] = {
        "instance": name,
        "address": address,
        "user": USER,
        "port": 22,
        "identity_file": str(place / "key"),
    }
    described.write_text(json.dumps(host))
    return host


def stop(place: Path, what: str, marker: str) -> None:
    """End a process that this program started, and only it."""
    pid_file = place / f"{what}.pid"
    if not pid_file.exists():
        return
    pid = int(pid_file.read_text())
    command_line = Path(f"/proc/{pid}/cmdline")
    for sign, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 10)):
        if not command_line.exists() or marker not in command_line.read_text():
            return
        os.kill(pid, sign)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and command_line.exists() and command_line.read_text():
            time.sleep(0.1)


def destroy(name: str) -> None:
    """Stop a host and remove everything of it; nothing happens when there is none."""
    HOSTS.mkdir(parents=True, exist_ok=True)
    place = HOSTS / name
    stop(place, "supervisor", f"supervise\0{name}\0")
    stop(place, "slirp", f"/run/netns/{name}")
    if (place / "root").is_mount():
        run("umount", place / "root")
    for group in control_groups(name):
        if group.exists():
            for folder, _, _ in os.walk(group, topdown=False):
                Path(folder).rmdir()
    if Path(f"/run/netns/{name}").exists():
        run("ip", "netns", "delete", name)
    shutil.rmtree(place, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("create", help="make and boot a host, print its connection")
    making.add_argument("name")
    making.add_argument("--release", choices=RELEASES, required=True)
    keeping = verbs.add_parser("supervise", help="run a host until it is switched off (create starts this)")
    keeping.add_argument("name")
    keeping.add_argument("--release", choices=RELEASES, required=True)
    ending = verbs.add_parser("destroy", help="stop a host and remove it")
    ending.add_argument("name")
    arguments = parser.parse_args()
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)} (make molecule-packages)")
    if os.geteuid() != 0:
        sys.exit("root is needed: this mounts file systems and makes network namespaces")
    if arguments.verb == "create":
        print(json.dumps(create(arguments.name, arguments.release)))
    elif arguments.verb == "supervise":
        return supervise(arguments.name, arguments.release)
    else:
        destroy(arguments.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
