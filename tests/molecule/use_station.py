#!/usr/bin/env python3
"""Use a deployed station as people do, and do to it what happens to stations.

    use_station.py verify HOST          an annotator's day, through nginx, with the timers doing the rest
    use_station.py side_effect HOST     stopped services, a reboot, new secrets, wrong settings

HOST is a test host of nspawn.py. Molecule calls this with STATION_ADDRESS and its own variables.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Thread

import requests
from playwright.sync_api import Response, sync_playwright

from guide import Guide
from host import CHECKOUT, EPHEMERAL, HOSTS, VAULT_PASSWORD_FILE, VAULTED, Station, healthy, step, wait_until
from station.errors import UnavailableError
from station.local_annotator import Annotator

PASSWORD = "only-for-this-test-1"
TASK_TYPE = "transcript_correction"
DATABASE_PASSWORD = "database_password_labelstation"
# Exposure that systemd-analyze security may find; ours, then those that need more.
OURS = 2.0
EXPOSURE = {"label-studio.service": 1.2, "label-studio-init.service": 1.2, "nginx.service": 2.7}
# What may listen, by the address and port of `ss`.
LISTENERS = {"0.0.0.0:22", "[::]:22", "*:22", "0.0.0.0:8085", "0.0.0.0:8081", "127.0.0.1:8086"}
# Where scenario `full` sends alerts to, on this machine.
WEBHOOK_PORT, MAIL_PORT = 9925, 9926


def verify(station: Station) -> None:
    """An annotator's day."""
    if station.full:
        # An all-clear may still be due, and counts as failed until it can be delivered.
        Receiver(f"{network(station)}.1")
    with step("doctor finds nothing wrong"):
        wait_until("doctor", lambda: healthy(station), 60)
        station.run("systemctl start labelstation-doctor")
    with step("a corpus is brought in and read"):
        archive = subprocess.run(["tar", "c", "-C", CHECKOUT / "demo/corpus", "."], capture_output=True, check=True)
        station.run(
            "tar x -C /srv/labelstation/raw --no-same-owner --no-same-permissions"
            " && chown -R labelstation:www-data /srv/labelstation/raw && chmod -R u=rwX,g=rX,o= /srv/labelstation/raw",
            given=archive.stdout,
        )
        station.run("labelstation ingest")
    with step("tasks are pushed"):
        station.run(f"labelstation push --task-type {TASK_TYPE} --limit 3")
    done = done_count(station)
    annotate(station)
    if station.full:
        look_at_options(station)
    look_for_openings(station)
    look_for_secrets(station)
    with step("the timer pulled what the annotator submitted"):
        wait_until("the pull timer", lambda: done_count(station) > done, 400)
    with step("what was reviewed is exported"):
        station.run("labelstation export")
        found = station.run("find /srv/labelstation/reviewed/transcript_verification -name transcript.json")
        assert found.strip(), "nothing was exported"
    with step("no unit has failed, but for what ran into one of the side effects, and works now"):
        for unit in failed(station, "labelstation-*"):
            station.run(f"systemctl start {unit}")
        assert not failed(station, "*"), failed(station, "*")


def failed(station: Station, units: str) -> list[str]:
    """The units that systemd calls failed."""
    listed = station.run(f"systemctl list-units --failed --no-legend --plain '{units}'")
    return [line.split()[0] for line in listed.splitlines() if line]


def annotate(station: Station) -> None:
    """Work as a person with an invitation."""
    with step("an invited annotator signs up and logs in through nginx"):
        admin = Annotator.with_token(station.address, station.secret("label_studio_api_token"))
        email = f"annotator-{time.time_ns()}@example.org"
        admin.invite(email, PASSWORD)
        person = Annotator(station.address).log_in(email, PASSWORD)
    with step("nobody signs up without an invitation"):
        try:
            Annotator(station.address).submit("/user/signup/", f"stranger-{time.time_ns()}@example.org", PASSWORD)
        except UnavailableError as error:
            assert "403" in str(error), error
        else:
            raise AssertionError("a stranger has an account now")
    with step("a recording: 401 without login, 206 for a range with it, no listing, no way out"):
        projects = {
            entry["title"]: entry["id"] for entry in person.call("GET", "/api/projects/?page_size=100")["results"]
        }
        project = projects["Transcript Correction"]
        task = person.next_task(project)
        assert task is not None, "no task waits"
        url = station.address + task["data"]["audio"]
        assert requests.get(url, timeout=30).status_code == requests.codes.unauthorized
        answer = person.session.get(url, headers={"Range": "bytes=0-99"}, timeout=30)
        assert (answer.status_code, len(answer.content)) == (206, 100), answer.status_code
        assert answer.headers["Content-Type"] == "audio/wav"
        for path in ("/audio/", "/audio/../metadata.jsonl", "/audio/..%2fmetadata.jsonl", "/audio../metadata.jsonl"):
            prepared = requests.Request("GET", station.address, cookies=person.session.cookies).prepare()
            prepared.url = station.address + path
            # `send` does not look into the environment.
            trusted = os.environ.get("REQUESTS_CA_BUNDLE") or True
            status = person.session.send(prepared, timeout=30, allow_redirects=False, verify=trusted).status_code
            assert status >= requests.codes.bad_request, f"{path}: {status}"
    with step("the interface's files come from nginx, the vendor's advertisements do not"):
        page = person.session.get(f"{station.address}/projects/{project}/", timeout=30)
        assert page.ok
        assert page.headers["X-Content-Type-Options"] == "nosniff"
        for path, status in (("/react-app/main.js", 200), ("/static/images/favicon.ico", 200), ("/heidi-tips", 404)):
            assert person.session.get(station.address + path, timeout=30).status_code == status, path
    with step("a browser shows the task and plays its recording, and nothing that the page asks for is missing"):
        look_in_browser(station, person, f"/projects/{project}/data?task={task['id']}")
    with step("the annotator submits"):
        result = json.loads((CHECKOUT / f"label_studio_templates/{TASK_TYPE}.annotation.json").read_text())["result"]
        person.annotate(task["id"], result, lead_time=5)


def look_in_browser(station: Station, person: Annotator, path: str) -> None:
    """Open a task as that person; leaves a picture of it below .local."""
    troubles: list[str] = []

    def look_at(answer: Response) -> None:
        if answer.status >= requests.codes.bad_request:
            troubles.append(f"{answer.status} {answer.url}")

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path="/usr/bin/chromium",
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = chromium.new_page(viewport={"width": 1400, "height": 1000}, ignore_https_errors=True)
        page.context.add_cookies(
            [
                {"name": name, "value": value, "url": station.address}
                for name, value in person.session.cookies.get_dict().items()
            ]
        )
        page.on("response", look_at)
        page.on("requestfailed", lambda request: troubles.append(f"{request.failure} {request.url}"))
        page.goto(station.address + path)
        page.wait_for_selector("canvas")
        page.wait_for_function("document.querySelector('audio')?.duration > 1")
        page.get_by_text("Loading file").wait_for(state="detached")
        page.screenshot(path=CHECKOUT / f".local/{station.name}.png")
        chromium.close()
    assert not troubles, troubles


def network(station: Station) -> str:
    """The first three numbers of the network that the station shares with this machine alone."""
    host = json.loads((HOSTS / station.name / "host.json").read_text())
    return str(host["address"]).rpartition(".")[0]


def done_count(station: Station) -> int:
    """How many samples are done."""
    status = json.loads(station.run("labelstation status --json"))
    return int(status["task_types"][TASK_TYPE]["done"])


def look_at_options(station: Station) -> None:
    """What only scenario `full` has."""
    host = station.address.removeprefix("https://").partition(":")[0]
    with step("TLS with HSTS; a plain request is sent on"):
        assert (
            "max-age" in requests.get(f"{station.address}/user/login/", timeout=30).headers["Strict-Transport-Security"]
        )
        plain = requests.get(f"http://{host}:8085/user/login/", timeout=30, allow_redirects=False)
        assert (plain.status_code, plain.headers["Location"]) == (308, f"{station.address}/user/login/")
    with step("the firewall lets the web port in and the second origin not"):
        try:
            requests.get(f"https://{host}:8081/audio/x.wav", timeout=3)
        except requests.ConnectionError:
            pass
        else:
            raise AssertionError("port 8081 can be reached")
    with step("scripts on another machine work with a password; without TLS, and into the other database, none does"):
        password = station.secret(DATABASE_PASSWORD)
        told = export_from_here(station, password)
        assert told.returncode == 0, told.stderr
        for wrong in ({"sslmode": "disable"}, {"dbname": "label_studio"}, {"user": "labelstation_owner"}):
            told = export_from_here(station, password, **wrong)
            assert told.returncode == 78, told.stderr
            assert "no pg_hba.conf entry" in told.stderr, told.stderr
    with step("the second origin serves ranges with CORS on the station itself"):
        said = station.run(
            "python3 -c 'import os, ssl, urllib.request as u; "
            'name = sorted(os.listdir("/srv/labelstation/raw/audio"))[0]; '
            'r = u.Request("https://127.0.0.1:8081/audio/" + name, headers={"Range": "bytes=0-9", "Origin": "x"}); '
            "a = u.urlopen(r, context=ssl._create_unverified_context()); "
            'print(a.status, a.headers["Access-Control-Allow-Origin"], a.headers["Vary"])\''
        )
        assert said.split() == ["206", station.address, "Origin"], said
    with step("a webhook may go to the receiver and to no other private address"):
        admin = Annotator.with_token(station.address, station.secret("label_studio_api_token"))
        for receiver, allowed in (("127.0.0.9", True), ("127.0.0.1", False), ("10.0.0.1", False)):
            try:
                made = admin.call("POST", "/api/webhooks/", {"project": 1, "url": f"http://{receiver}:8000/webhook"})
            except requests.HTTPError as error:
                assert not allowed, error
            else:
                admin.call("DELETE", f"/api/webhooks/{made['id']}/")
                assert allowed, receiver


def export_from_here(station: Station, password: str, **different: str) -> subprocess.CompletedProcess[str]:
    """`export --dry-run` on this machine, which has the recordings, with the station's database."""
    dsn = {
        "host": station.address.removeprefix("https://").partition(":")[0],
        "sslmode": "require",
        "dbname": "data_factory",
        "user": "labelstation",
        "password": password,
        **different,
    }
    settings = EPHEMERAL / "elsewhere.env"
    settings.write_text(
        f"DATA_FACTORY_DSN='{' '.join(f'{name}={value}' for name, value in dsn.items())}'\n"
        f"RAW_DIR={CHECKOUT / 'demo/corpus'}\nREVIEWED_DIR={EPHEMERAL / 'reviewed'}\n"
    )
    command = [sys.executable, str(CHECKOUT / "scripts/export.py"), "--env-file", str(settings), "--dry-run"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]})


def look_for_openings(station: Station) -> None:
    """Ports, and how far each unit could reach if it were taken over."""
    with step("nothing listens that should not"):
        listening = {line.split()[3] for line in station.run("ss -Hltn").splitlines()}
        allowed = LISTENERS | ({"0.0.0.0:5432"} if station.full else set())
        assert listening <= allowed, listening - allowed
        assert not station.run("ss -Hlun").strip()
    with step("the databases let in the station's own accounts and nobody else"):
        asked = "psql -XAtq -c 'SELECT rolname FROM pg_authid WHERE rolpassword IS NOT NULL'"
        with_password = station.run(f"runuser -u postgres -- {asked}").split()
        assert with_password == (["labelstation"] if station.full else []), with_password
        for account in ("lab", "www-data", "label-studio", "root"):
            for role in ("labelstation", "labelstation_owner", "postgres"):
                asked = f"psql -XAtq -d data_factory -U {role} -c 'SELECT 1'"
                station.run(f"cd /; runuser -u {account} -- {asked}", ok=(2,))
    with step("every unit of ours is in a sandbox"):
        units = station.run("cd /etc/systemd/system; ls -d labelstation-*.service label-studio*.service").split()
        units = [unit.replace("@.", "@x.") for unit in units if not unit.endswith(".d")] + ["nginx.service"]
        for unit in units:
            said = station.run(f"systemd-analyze security --no-pager {unit} | tail -1")
            exposure = re.search(r"([0-9.]+) [A-Z]", said)
            assert exposure is not None, said
            assert float(exposure[1]) <= EXPOSURE.get(unit, OURS), f"{unit}: {exposure[1]}"


def look_for_secrets(station: Station) -> None:
    """Where secrets must not be."""
    with step("no secret in the journal, an argument list or a file that others may read"):
        patterns = "\n".join(station.secrets()).encode()
        found = station.run(
            "secrets=$(mktemp); cat > $secrets; journalctl --no-pager | grep -cF -f $secrets; "
            "ps axww -o args | grep -cF -f $secrets; "
            "find /etc /home /opt/labelstation /run /srv /tmp /usr/local /var /root -xdev -type f -perm -o=r -size -2M "
            "-print0 | xargs -0 grep -lF -f $secrets; rm $secrets",
            given=patterns,
        )
        assert found.split() == ["0", "0"], found


class Receiver:
    """What scenario `full` sends alerts to: a webhook, a health-check service and a mail server."""

    def __init__(self, address: str) -> None:
        """Listen; what comes is kept."""
        self.posts: list[str] = []
        self.pings: list[str] = []
        self.mails: list[str] = []
        receiver = self

        class Web(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                receiver.posts.append(body["subject"])
                self.send_response(204)
                self.end_headers()

            def do_GET(self) -> None:
                receiver.pings.append(self.path)
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_arguments: object) -> None:
                pass

        class Mail(StreamRequestHandler):
            def handle(self) -> None:
                self.wfile.write(b"220 test\r\n")
                while command := self.rfile.readline().strip().upper():
                    if command == b"DATA":
                        self.wfile.write(b"354 go on\r\n")
                        lines = iter(self.rfile.readline, b".\r\n")
                        receiver.mails += [line.decode() for line in lines if line.startswith(b"Subject: ")]
                    self.wfile.write(b"221 bye\r\n" if command == b"QUIT" else b"250 yes\r\n")
                    if command == b"QUIT":
                        return

        for server in (
            ThreadingHTTPServer((address, WEBHOOK_PORT), Web),
            ThreadingTCPServer((address, MAIL_PORT), Mail),
        ):
            Thread(target=server.serve_forever, daemon=True).start()


def side_effect(station: Station) -> None:
    """What happens to stations."""
    receiver = Receiver(f"{network(station)}.1") if station.full else None
    for unit in ("postgresql@*", "label-studio", "nginx"):
        stop_and_start(station, unit)
    if receiver:
        with step("each alert came by webhook and by mail, once; the health-check service was asked"):
            ends = ["fails", "works again"] * 3
            assert [post.partition(f"{station.name} ")[2] for post in receiver.posts] == ends, receiver.posts
            assert [mail.partition(f"{station.name} ")[2].strip() for mail in receiver.mails] == ends, receiver.mails
            assert {"/ping", "/ping/fail"} <= set(receiver.pings), receiver.pings
    with step("after a reboot all is back"):
        before = station.run("systemctl show --property=UserspaceTimestamp")
        station.run("systemctl --no-block reboot", ok=(0, 255))
        wait_until("the reboot", lambda: rebooted(station, before), 120)
        wait_until("doctor", lambda: healthy(station), 120)
    wrong_settings()
    wrong_rule(station)
    guide = None if station.full else Guide(station)
    if guide:
        follow_first_day(station, guide)
    rotate(station, guide)
    with step("a dry run finds nothing to change"):
        code, output, seconds = playbook("--check", "--diff")
        assert code == 0, output[-4000:]
        assert "changed=0" in output, [line for line in output.splitlines() if line.startswith("changed")]
        print(f"     {seconds:.0f} s")
    if guide:
        upgrade(station)
        move(station, guide)
        assert not guide.waiting, f"nobody has followed {guide.waiting}"


def rebooted(station: Station, before: str) -> bool:
    """Whether the host answers, and began anew since then."""
    try:
        return station.run("systemctl show --property=UserspaceTimestamp") != before
    except (AssertionError, subprocess.TimeoutExpired):
        return False


def stop_and_start(station: Station, unit: str) -> None:
    """One service down: doctor names it, one alert is raised; up again: all recovers, one all-clear."""
    with step(f"{unit} stopped: doctor says so, one alert, and all recovers when it returns"):
        name = unit.removesuffix("@*")
        mark = station.run("date +%s").strip()
        units = station.run(f"systemctl list-units --plain --no-legend '{unit}.service' | cut -d' ' -f1").split()
        station.run(f"systemctl stop {' '.join(units)}")
        said = station.run("labelstation doctor", ok=(3,))
        assert re.search(rf"^FAIL {name}", said, re.MULTILINE), said
        for _ in range(3):
            station.run("systemctl start labelstation-doctor", ok=(1,))
        station.run(f"systemctl start {' '.join(units)}")
        wait_until("doctor", lambda: healthy(station), 60)
        for _ in range(2):
            station.run("systemctl start labelstation-doctor")
        wait_until(
            "the alerts",
            lambda: alerts(station, mark) == ["labelstation-doctor fails", "labelstation-doctor works again"],
            20,
        )


def alerts(station: Station, since: str) -> list[str]:
    """What was said about doctor since then."""
    lines = station.run(f"journalctl -q --no-pager -o cat --since @{since} -t labelstation-alert").splitlines()
    return [
        re.sub(r"^ALERT (\S+) on \S+ ", r"\1 ", line) for line in lines if line.startswith("ALERT labelstation-doctor")
    ]


def playbook(*arguments: str, inventory: Path = EPHEMERAL / "inventory") -> tuple[int, str, float]:
    """Deploy, with the scenario's inventory unless told otherwise; exit code, output, seconds."""
    started = time.monotonic()
    done = subprocess.run(
        ["ansible-playbook", "-i", inventory, CHECKOUT / "playbooks/site.yml", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(EPHEMERAL / "ansible.cfg"),
            **({"ANSIBLE_VAULT_PASSWORD_FILE": str(VAULT_PASSWORD_FILE)} if VAULT_PASSWORD_FILE.exists() else {}),
        },
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - started


def wrong_settings() -> None:
    """A setting that is wrong is refused by its name, at once."""
    for argument, named in (
        ("label_studio_version=0.0.1", "label_studio_version"),
        ("nginx_prot=80", "nginx_prot"),
        ("nginx_tls=maybe", "nginx_tls"),
        ("label_studio_address=label.example.org", "label_studio_address"),
        ("secrets_directory={{ inventory_dir }}/secrets", "secrets_directory"),
    ):
        with step(f"{argument} is refused"):
            code, output, seconds = playbook("-e", argument)
            assert code != 0
            assert named in output, output[-2000:]
            assert "changed=0" in output, output[-2000:]
            print(f"     after {seconds:.1f} s")

    with step("missing settings are named, before the host is even asked"):
        inventory = EPHEMERAL / "missing.yml"
        inventory.write_text(
            "labelstation: {hosts: {nowhere: {ansible_host: 127.0.0.250, label_studio_version: 1.23.2}}}\n"
        )
        code, output, seconds = playbook(inventory=inventory)
        assert code != 0
        assert "missing setting: label_studio_address, label_studio_admin_email" in output, output[-2000:]
        print(f"     after {seconds:.1f} s")


def wrong_rule(station: Station) -> None:
    """PostgreSQL itself judges who may come in, before it has to obey."""
    with step("a rule that PostgreSQL cannot read is refused by its line, and the old ones stay"):
        files = "cat /etc/postgresql/*/main/pg_hba.conf /etc/postgresql/*/main/pg_ident.conf"
        before = station.run(files)
        rules = {"postgres_extra_hba": ["host data_factory labelstation no-such-network/99 scram-sha-256"]}
        code, output, _ = playbook("--tags", "postgres", "-e", json.dumps(rules))
        assert code != 0
        assert "pg_hba.conf line" in output, output[-4000:]
        assert station.run(files) == before
        assert healthy(station)


def follow_first_day(station: Station, guide: Guide) -> None:
    """From the example of an inventory to work in the annotators' queues, and what is looked up later."""
    VAULT_PASSWORD_FILE.write_text("only-for-this-test\n")
    with step("the guide's first day, with the firewall that the example asks for"):
        said = guide.follow("First day")
        assert "labelstation-doctor" in said
        assert "healthy" in said
        assert all(secret not in said for secret in station.secrets())
        listed = subprocess.run(
            ["ansible-inventory", "-i", guide.lab, "--list"], capture_output=True, text=True, check=True
        ).stdout
        assert "station" in listed
        assert all(secret not in listed for secret in station.secrets()), "a secret is a host of the inventory"
        # Fails when a port is closed that has to be open.
        requests.get(f"{station.address}/user/login/", timeout=30).raise_for_status()
    with step("the example copied a second time, which puts it inside, is refused"):
        inside = guide.lab / "example"
        shutil.copytree(CHECKOUT / "inventory/example", inside)
        code, output, _ = playbook(inventory=guide.lab)
        assert code != 0
        assert f"{inside} lies in the inventory {guide.lab}" in " ".join(output.split()), output[-2000:]
        shutil.rmtree(inside)
    with step("a forgotten password"):
        admin = Annotator.with_token(station.address, station.secret("label_studio_api_token"))
        email = "person@example.org"
        admin.invite(email, PASSWORD)
        guide.follow("Users and invitations", typed="another-for-this-test-1")
        Annotator(station.address).log_in(email, "another-for-this-test-1")
    with step("the guide's ways to look at projects, health, logs and symptoms"):
        for section in ("Projects", "Is it healthy", "Logs", "When something is wrong"):
            guide.follow(section)


def upgrade(station: Station) -> None:
    """A Label Studio that the scripts could not read is refused before it is let near the real tables."""
    other = EPHEMERAL / "other"
    lock = other / "label_studio.txt"
    arguments = (
        "-e", f"base_source_directory={other}", "-e", f"base_requirements={CHECKOUT / 'requirements/station.txt'}",
        "-e", f"label_studio_requirements={lock}",
    )  # fmt: skip
    state = "readlink /opt/label-studio/venv; systemctl show -p MainPID label-studio"
    with step("an upgrade that would break the contract is refused, and Label Studio goes on"):
        for folder in ("scripts", "sql", "label_studio_templates"):
            shutil.copytree(CHECKOUT / folder, other / folder)
        contract = other / "scripts/station/contract.py"
        right = contract.read_text()
        contract.write_text(right.replace('"was_cancelled":', '"no_such_column": "text", "was_cancelled":'))
        lock.write_text((CHECKOUT / "requirements/label_studio.txt").read_text() + "# another version\n")
        before = station.run(state)
        code, output, seconds = playbook(*arguments)
        assert code != 0
        assert "was refused" in output, output[-4000:]
        assert "no_such_column" in output, output[-4000:]
        assert station.run(state) == before
        assert "rehearsal" not in station.run("runuser -u postgres -- psql -XAtlq")
        # The scripts are new, the deployment never ended: no job runs until one does, and doctor tells.
        assert "WARN labelstation-pull: its timer is inactive" in station.run("labelstation doctor", ok=(3,))
        print(f"     {seconds:.0f} s")
    with step("one that the scripts can read is let in"):
        contract.write_text(right)
        code, output, seconds = playbook(*arguments)
        assert code == 0, output[-4000:]
        assert station.run(state) != before
        assert healthy(station)
        station.run("systemctl is-active labelstation-pull.timer")
        print(f"     {seconds:.0f} s")


def move(station: Station, guide: Guide) -> None:
    """To a new server; this one is it, after everything was destroyed."""
    with step("everything is brought home and dumped"):
        guide.follow("Clean reset", count=1)
        before = done_count(station)
        guide.follow("A new server", count=1)
    with step("uninstalled: the databases and files stay"):
        guide.follow("Clean reset", count=1)
        assert not station.run("cd /etc/systemd/system; find . -name 'label*' -type f").strip()
        assert "data_factory" in station.run("runuser -u postgres -- psql -XAtlq")
        station.run("ls /srv/labelstation/raw/metadata.jsonl")
    with step("uninstalled with its data: nothing stays"):
        guide.follow("Clean reset", count=1)
        assert "data_factory" not in station.run("runuser -u postgres -- psql -XAtlq")
        assert not station.run("ls -d /srv/labelstation /var/lib/label-studio 2>/dev/null", ok=(2,)).strip()
    with step("deployed as a new one"):
        guide.follow("A new server", count=1)
        assert done_count(station) == 0
    with step("what people made is in its place again, and was brought up to date"):
        runs_of_init = "journalctl -q --no-pager -o cat -u label-studio-init | grep -c ^Finished"
        before_restore = int(station.run(runs_of_init))
        guide.follow("A new server")
        # Restored tables may be those of an earlier version.
        assert int(station.run(runs_of_init)) == before_restore + 1
        assert done_count(station) == before
        Annotator(station.address).log_in("person@example.org", "another-for-this-test-1")
        assert healthy(station)


def rotate(station: Station, guide: Guide | None) -> None:
    """New secrets take effect, the old ones stop working, and no secret is in the output."""
    old = station.secrets()
    old_token = station.secret("label_studio_api_token")
    old_password = station.secret(DATABASE_PASSWORD) if station.full else ""
    with step("a deployment with a new token and new passwords"):
        # The vaulted password of scenario `full` is not made, so it is not made anew.
        names = ["label_studio_api_token", DATABASE_PASSWORD] if station.full else ["label_studio_admin_password"]
        for name in names:
            place = EPHEMERAL / "secrets" / name
            place.rename(place.with_suffix(".old"))
        if guide:
            output = guide.follow("Rotating secrets")
        else:
            code, output, _ = playbook("-v", "--diff")
            assert code == 0, output[-4000:]
        for secret in {*old, *station.secrets()}:
            assert secret not in output, "a secret is in the playbook's output"
    with step("the old token is dead, the new one works, the new password logs in"):
        assert station.secrets() != old
        for token, status in ((old_token, 401), (station.secret("label_studio_api_token"), 200)):
            answer = requests.get(
                f"{station.address}/api/current-user/whoami", headers={"Authorization": f"Token {token}"}, timeout=30
            )
            assert answer.status_code == status, answer.status_code
        password = VAULTED if station.full else station.secret("label_studio_admin_password")
        Annotator(station.address).log_in("admin@example.org", password)
        if station.full:
            told = export_from_here(station, old_password)
            assert told.returncode == 78, told.stderr
            assert "password authentication failed" in told.stderr, told.stderr
            told = export_from_here(station, station.secret(DATABASE_PASSWORD))
            assert told.returncode == 0, told.stderr
        wait_until("doctor", lambda: healthy(station), 60)


def main() -> int:
    """Run one of the two; a failure comes with the station's journal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=("verify", "side_effect"))
    parser.add_argument("host")
    arguments = parser.parse_args()
    station = Station(arguments.host, os.environ["STATION_ADDRESS"])
    try:
        station.trust()
        (verify if arguments.verb == "verify" else side_effect)(station)
    except Exception as error:
        print(f"FAILED: {type(error).__name__}: {error}")
        journal = station.run("journalctl --no-pager")
        place = CHECKOUT / f".local/{station.name}.journal"
        place.write_text(journal)
        ours = [line for line in journal.splitlines() if not re.search("sshd|sudo|ession", line)]
        print("\n".join([f"The end of the station's journal ({place}):", *ours[-80:]]))
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
