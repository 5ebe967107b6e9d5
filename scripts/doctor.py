#!/usr/bin/env python3
"""Look at everything a station stands on.

One line a thing, OK, WARN or FAIL, with what to do about it, and one verdict. Exit code 3 when something FAILs.
"""

import argparse
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import requests

from station import cli, contract
from station.database import Connection, connect, connect_data_factory, project_ids
from station.errors import ExitCode, StationError
from station.label_studio import LabelStudio
from station.settings import Settings, load_settings
from station.task_types import TASK_TYPES

# Patterns of unit names. Debian's postgresql.service only stands for the clusters: it is active even when they are not.
SERVICES = {
    "postgresql@*.service": "the databases",
    "label-studio.service": "what annotators work in",
    "nginx.service": "the web server in front of it",
}
# The newest PostgreSQL that Label Studio 1.23 refuses is 13.
OLDEST_POSTGRESQL = 140000
DISK_WARN_SHARE, DISK_FAIL_SHARE = 0.15, 0.05
CERTIFICATE_WARN_DAYS = 21
ANSWER_SECONDS = 10
OWN_TIMER = "labelstation-doctor"
# A deployment holds the timers while it changes what they run; one that takes longer has ended early.
HOLD_SECONDS = 1800


@dataclass(frozen=True)
class Finding:
    """One line of the result.

    Attributes:
        verdict: OK, WARN or FAIL.
        thing: what was looked at.
        found: what was seen.
        remedy: what to do; empty when there is nothing to do.
    """

    verdict: str
    thing: str
    found: str
    remedy: str = ""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    return cli.parser((__doc__ or "").strip())


def main(options: argparse.Namespace) -> ExitCode:
    """Look at each thing; one that cannot be looked at has failed."""
    settings = load_settings(options.env_file)
    # For the script that look_at_projects calls.
    os.environ["LABELSTATION_ENV_FILE"] = str(options.env_file)
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check(settings)
        except StationError as error:
            findings.append(Finding("FAIL", THINGS[check], str(error), "see the services above"))
    failed = sum(finding.verdict == "FAIL" for finding in findings)
    warned = sum(finding.verdict == "WARN" for finding in findings)
    verdict = f"{failed} FAIL, {warned} WARN" if failed else f"healthy, {warned} WARN" if warned else "healthy"
    cli.print_result(
        options,
        {"verdict": verdict, "failed": failed, "warned": warned, "checks": [asdict(one) for one in findings]},
        [*map(line, findings), verdict],
    )
    return ExitCode.PARTIAL if failed else ExitCode.DONE


def line(finding: Finding) -> str:
    """A finding for people."""
    remedy = f" → {finding.remedy}" if finding.remedy else ""
    return f"{finding.verdict:<4} {finding.thing}: {finding.found}{remedy}"


def look_at_services(_settings: Settings) -> Iterator[Finding]:
    """What systemd says about the services."""
    for pattern, purpose in SERVICES.items():
        listed = systemctl("list-units", "--all", "--plain", "--no-legend", pattern).splitlines()
        services = [entry.split()[0] for entry in listed if entry.strip()]
        if not services:
            yield Finding("WARN", pattern.split(".")[0], "this machine has no such service", "expected off a station")
        for service in services:
            shown = systemctl("show", "--property=ActiveState,SubState,ActiveEnterTimestamp", service)
            values = dict(entry.split("=", 1) for entry in shown.splitlines() if "=" in entry)
            name = service.removesuffix(".service")
            if values["ActiveState"] == "active":
                yield Finding("OK", name, f"{values['SubState']} since {values['ActiveEnterTimestamp']}")
            else:
                yield Finding(
                    "FAIL",
                    name,
                    f"{purpose}: {values['ActiveState']} ({values['SubState']})",
                    f"systemctl start {name}; journalctl -u {name}",
                )


def look_at_label_studio(settings: Settings) -> Iterator[Finding]:
    """Whether it answers, knows the token, and keeps its data where the scripts read it."""
    try:
        label_studio = LabelStudio(settings)
        version = label_studio.version()
    except StationError as error:
        yield Finding("FAIL", "Label Studio", str(error), "systemctl status label-studio; journalctl -u label-studio")
        return
    if version == contract.VERSION:
        yield Finding("OK", "Label Studio", f"{version} at {label_studio.address}")
    else:
        yield Finding(
            "WARN",
            "Label Studio",
            f"{version} at {label_studio.address}; the scripts were written for {contract.VERSION}",
            "deploy the tested version, or test this one",
        )
    try:
        yield Finding("OK", "token", f"is {label_studio.whoami()}")
    except StationError as error:
        yield Finding("FAIL", "token", str(error), "deploy again, or put a valid token into LABEL_STUDIO_API_KEY")
    with connect(settings, "label_studio_dsn", "doctor") as connection:
        contract.check(connection)
    yield Finding("OK", "Label Studio's database", f"PostgreSQL, as the scripts need it ({contract.VERSION})")


def look_at_web_server(settings: Settings) -> Iterator[Finding]:
    """Whether people can reach Label Studio, and for how long its certificate is good."""
    address = settings.label_studio_proxy_url
    if address is None:
        yield Finding("OK", "web server", "none in front of Label Studio (LABEL_STUDIO_PROXY_URL is not set)")
        return
    try:
        status = get(f"{address}/user/login/").status_code
        closed = get(f"{address}/heidi-tips").status_code
    except requests.RequestException as error:
        yield Finding("FAIL", "web server", unreachable(address, error), "systemctl status nginx; nginx -t")
        return
    if status == requests.codes.ok:
        yield Finding("OK", "web server", f"login page at {address}")
    else:
        yield Finding("FAIL", "web server", f"{address}/user/login/ answers {status}", "journalctl -u label-studio")
    if closed != requests.codes.not_found:
        yield Finding("WARN", "web server", "/heidi-tips, the vendor's advertisements, is open", "deploy role nginx")
    if address.startswith("https:"):
        yield look_at_certificate(address)


def look_at_certificate(address: str) -> Finding:
    """When the certificate ends."""
    split = urllib.parse.urlsplit(address)
    certificate = ssl.get_server_certificate((split.hostname or "", split.port or 443), timeout=ANSWER_SECONDS)
    asked = subprocess.run(
        ["openssl", "x509", "-noout", "-enddate", "-dateopt", "iso_8601"],
        input=certificate,
        check=False,
        capture_output=True,
        text=True,
    )
    if asked.returncode != 0:
        return Finding("WARN", "certificate", "openssl cannot read it", "openssl s_client -connect …")
    ends = datetime.fromisoformat(asked.stdout.strip().removeprefix("notAfter="))
    days = (ends - datetime.now(UTC)).days
    if days < CERTIFICATE_WARN_DAYS:
        return Finding("WARN" if days >= 0 else "FAIL", "certificate", f"ends {ends:%Y-%m-%d}", "renew it and deploy")
    return Finding("OK", "certificate", f"good until {ends:%Y-%m-%d}")


def look_at_data_factory(settings: Settings) -> Iterator[Finding]:
    """Whether the scripts' own database answers, and the server's settings are safe."""
    with connect_data_factory(settings, "doctor") as connection:
        yield Finding("OK", "data_factory", f"{ask(connection, 'SELECT count(*) FROM samples')} samples")
        version = int(ask(connection, "SELECT current_setting('server_version_num')"))
        name = ask(connection, "SELECT split_part(current_setting('server_version'), ' ', 1)")
        if version < OLDEST_POSTGRESQL:
            yield Finding("FAIL", "PostgreSQL", f"{name} is too old for Label Studio", "upgrade to 14 or newer")
        else:
            yield Finding("OK", "PostgreSQL", name)
        for setting, remedy in (
            ("fsync", "remove it from the configuration: a power cut would destroy the databases"),
            ("full_page_writes", "remove it from the configuration: a power cut would destroy the databases"),
            ("autovacuum", "remove it from the configuration: the databases would grow without end"),
            ("data_checksums", "stop PostgreSQL and run pg_checksums --enable: a bad disk would go unnoticed"),
        ):
            value = ask(connection, f"SELECT current_setting('{setting}')")
            if value != "on":
                yield Finding(
                    "FAIL" if setting != "data_checksums" else "WARN", "PostgreSQL", f"{setting} is {value}", remedy
                )
        used = int(ask(connection, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"))
        most = int(ask(connection, "SELECT current_setting('max_connections')"))
        if used > most * 0.8:
            yield Finding(
                "WARN", "PostgreSQL", f"{used} of {most} connections in use", "raise postgres_max_connections"
            )


def look_at_projects(settings: Settings) -> Iterator[Finding]:
    """Whether the projects are as setup_projects would make them."""
    script = Path(__file__).with_name("setup_projects.py")
    asked = subprocess.run(
        [sys.executable, str(script), "--dry-run", "--json"],
        # Its words go into a line of ours, so without journald's priorities.
        env={name: value for name, value in os.environ.items() if name != "JOURNAL_STREAM"},
        check=False,
        capture_output=True,
        text=True,
    )
    with connect_data_factory(settings, "doctor") as connection:
        known = project_ids(connection, settings)
    if asked.returncode != 0:
        said = asked.stderr.strip().splitlines()
        yield Finding("FAIL", "projects", said[-1] if said else "setup_projects failed", "labelstation setup-projects")
        return
    for name, entry in json.loads(asked.stdout).items():
        if name not in TASK_TYPES:
            continue
        if entry["outcome"] == "unchanged":
            yield Finding("OK", f"project of {name}", f"{known.get(name)} in Label Studio, as its template says")
        else:
            yield Finding(
                "WARN", f"project of {name}", f"is not as its template says ({entry['outcome']})", "setup-projects"
            )


def look_at_audio(settings: Settings) -> Iterator[Finding]:
    """Whether a recording can be heard the way a browser asks for it, and not by strangers."""
    with connect_data_factory(settings, "doctor") as connection:
        row = connection.execute(
            "SELECT audio_path FROM samples WHERE audio_path IS NOT NULL AND removed_at IS NULL LIMIT 1"
        ).fetchone()
    if row is None:
        yield Finding("OK", "audio", "no sample has any yet")
        return
    path = str(row[0])
    if not (settings.raw_dir / path).is_file():
        yield Finding("FAIL", "audio", f"{settings.raw_dir / path} is not there", "bring the recordings to RAW_DIR")
        return
    behind_login = settings.audio_server_url == ""
    address = settings.audio_server_url or settings.label_studio_proxy_url or ""
    if not address:
        yield Finding("WARN", "audio", "LABEL_STUDIO_PROXY_URL is not set: not looked at", "set it")
        return
    url = f"{address}/{quote(path)}"
    headers = {"Range": "bytes=0-99"}
    try:
        if behind_login:
            stranger = get(url, headers).status_code
            if stranger != requests.codes.unauthorized:
                yield Finding("FAIL", "audio", f"without a login {url} answers {stranger}", "deploy role nginx")
            headers["Authorization"] = f"Token {settings.require('label_studio_api_key')}"
        else:
            headers["Origin"] = settings.label_studio_proxy_url or settings.label_studio_url
        answer = get(url, headers)
    except requests.RequestException as error:
        yield Finding("FAIL", "audio", unreachable(url, error), "systemctl status nginx")
        return
    if answer.status_code != requests.codes.partial_content:
        yield Finding(
            "FAIL", "audio", f"{url} answers a range with {answer.status_code}", "can www-data read the file? nginx -t"
        )
    elif not behind_login and "Access-Control-Allow-Origin" not in answer.headers:
        yield Finding("FAIL", "audio", f"{url} has no CORS header: browsers refuse it", "set nginx_audio_origin")
    else:
        yield Finding("OK", "audio", "ranges, " + ("behind the login" if behind_login else "with CORS"))


def look_at_timers(_settings: Settings) -> Iterator[Finding]:
    """Whether each timer runs, and how its job ended last."""
    listed = systemctl("list-units", "--all", "--plain", "--no-legend", "--type=timer", "labelstation-*")
    units = [entry.split()[0].removesuffix(".timer") for entry in listed.splitlines() if entry.strip()]
    if not units:
        yield Finding("WARN", "timers", "this machine has none", "expected off a station")
    for unit in units:
        shown = systemctl("show", "--property=ActiveState,InactiveEnterTimestampMonotonic", f"{unit}.timer")
        timer = dict(entry.split("=", 1) for entry in shown.splitlines() if "=" in entry)
        state = timer.get("ActiveState", "unknown")
        if state != "active":
            stopped = int(timer.get("InactiveEnterTimestampMonotonic", 0)) / 1e6
            if state == "inactive" and stopped and time.monotonic() - stopped < HOLD_SECONDS:
                found = f"its timer is {state} since less than {HOLD_SECONDS // 60} minutes"
                yield Finding("WARN", unit, found, "a deployment starts it again when it is done")
            else:
                yield Finding("FAIL", unit, f"its timer is {state}", f"systemctl start {unit}.timer")
            continue
        if unit == OWN_TIMER:
            yield Finding("OK", unit, "its timer runs")
            continue
        shown = systemctl("show", "--property=Result,ExecMainStatus,ExecMainExitTimestamp", f"{unit}.service")
        values = dict(entry.split("=", 1) for entry in shown.splitlines() if "=" in entry)
        ended = values.get("ExecMainExitTimestamp", "")
        if not ended:
            # systemd forgets how a job ended when it reads its units again.
            last = systemctl("show", "--property=LastTriggerUSec", "--value", f"{unit}.timer").strip()
            yield Finding("OK", unit, f"last started {last}" if last not in ("", "n/a") else "has not run yet")
        elif values.get("Result") == "success":
            yield Finding("OK", unit, f"succeeded {ended}")
        else:
            # Its own alert has told already; a second alarm for the same thing would not help.
            reason = f"{values.get('Result')}, exit status {values.get('ExecMainStatus')}"
            yield Finding("WARN", unit, f"failed {ended} ({reason})", f"journalctl -u {unit}")


def look_at_disks(settings: Settings) -> Iterator[Finding]:
    """Room where data is written."""
    seen = set()
    for place in (Path("/"), Path("/var/lib"), settings.raw_dir, settings.reviewed_dir):
        existing = next((one for one in (place, *place.resolve().parents) if one.exists()), Path("/"))
        device = existing.stat().st_dev
        if device in seen:
            continue
        seen.add(device)
        usage = shutil.disk_usage(existing)
        share = usage.free / usage.total
        found = f"{usage.free / 1e9:.0f} GB of {usage.total / 1e9:.0f} GB free"
        if share >= DISK_WARN_SHARE:
            yield Finding("OK", f"disk of {existing}", found)
        else:
            verdict = "WARN" if share >= DISK_FAIL_SHARE else "FAIL"
            yield Finding(verdict, f"disk of {existing}", found, "make room: PostgreSQL stops when it is full")


def look_at_clock(settings: Settings) -> Iterator[Finding]:
    """Whether this machine and the database agree on the time, and somebody keeps it right."""
    with connect_data_factory(settings, "doctor") as connection:
        there = connection.execute("SELECT clock_timestamp()").fetchone()
    if there is not None and abs(datetime.now(UTC) - there[0]) > timedelta(seconds=5):
        yield Finding("FAIL", "clock", "differs from the database server's by more than 5 s", "set up time keeping")
        return
    asked = subprocess.run(
        ["timedatectl", "show", "--property=NTPSynchronized", "--value"], check=False, capture_output=True, text=True
    )
    if asked.stdout.strip() == "yes":
        yield Finding("OK", "clock", "kept by the network")
    else:
        yield Finding("WARN", "clock", "nobody keeps it right", "apt install systemd-timesyncd")


def systemctl(*arguments: str) -> str:
    """What systemctl prints; nothing where there is no systemd."""
    if shutil.which("systemctl") is None:
        return ""
    return subprocess.run(
        ["systemctl", *arguments], check=False, capture_output=True, text=True, env={**os.environ, "SYSTEMD_PAGER": ""}
    ).stdout


def get(url: str, headers: dict[str, str] | None = None) -> requests.Response:
    """Ask a server of this station. Whose certificate it is does not matter: the address is this machine's own."""
    with requests.Session() as session:
        session.trust_env = False
        session.verify = False
        warnings.filterwarnings("ignore", "Unverified HTTPS request")
        return session.get(url, headers=headers, timeout=ANSWER_SECONDS, allow_redirects=False)


def unreachable(address: str, error: requests.RequestException) -> str:
    """What kept a request from being answered."""
    return f"{address} does not answer ({type(error).__name__})"


def ask(connection: Connection, question: str) -> str:
    """The one value that a query returns."""
    row = connection.execute(question.encode()).fetchone()
    return str(row[0]) if row else ""


THINGS: dict[Callable[[Settings], Iterator[Finding]], str] = {
    look_at_services: "services",
    look_at_label_studio: "Label Studio",
    look_at_web_server: "web server",
    look_at_data_factory: "data_factory",
    look_at_projects: "projects",
    look_at_audio: "audio",
    look_at_timers: "timers",
    look_at_disks: "disks",
    look_at_clock: "clock",
}
CHECKS = tuple(THINGS)


if __name__ == "__main__":
    cli.run(parser(), main)
