"""An alert is said once, when a job begins to fail, and once when it works again."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Thread

import pytest

ALERT = Path(__file__).resolve().parents[2] / "roles/alert/files/alert.py"
OK, FAILS, AGAIN = ("success", "0"), ("exit-code", "1"), ("exit-code", "75")


class Webhook:
    """A receiver of alerts that can be told to fail."""

    def __init__(self) -> None:
        self.states: list[str] = []
        self.status = 204
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if webhook.status == 204:
                    webhook.states.append(body["state"])
                self.send_response(webhook.status)
                self.end_headers()

            def log_message(self, *_arguments: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    result = Webhook()
    yield result
    result.server.shutdown()
    result.server.server_close()


def ends(
    folder: Path, webhook: Webhook, outcome: tuple[str, str], job: str = "labelstation-pull"
) -> subprocess.CompletedProcess[str]:
    """A job's run has ended; what the alert did."""
    (folder / "ALERT_WEBHOOK_URL").write_text(f"http://127.0.0.1:{webhook.server.server_port}/secret-path")
    return subprocess.run(
        [sys.executable, ALERT, job],
        env={
            "PATH": os.environ["PATH"],
            "MONITOR_SERVICE_RESULT": outcome[0],
            "MONITOR_EXIT_STATUS": outcome[1],
            "STATE_DIRECTORY": str(folder),
            "CREDENTIALS_DIRECTORY": str(folder),
            "ALERT_TRIES": "3",
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        ([OK, OK], []),
        ([FAILS, FAILS, FAILS, OK, OK], ["fails", "works"]),
        ([AGAIN, AGAIN, OK, AGAIN, AGAIN, OK], []),
        ([AGAIN, AGAIN, AGAIN, AGAIN, OK], ["fails", "works"]),
        ([FAILS, AGAIN, OK], ["fails", "works"]),
        ([("timeout", "15"), OK], ["fails", "works"]),
    ],
)
def test_only_a_change_is_said(
    tmp_path: Path, webhook: Webhook, outcomes: list[tuple[str, str]], said: list[str]
) -> None:
    for outcome in outcomes:
        assert ends(tmp_path, webhook, outcome).returncode == 0
    assert webhook.states == said


def test_what_could_not_be_delivered_is_said_again(tmp_path: Path, webhook: Webhook) -> None:
    webhook.status = 500
    failed = ends(tmp_path, webhook, FAILS)
    assert failed.returncode == 1
    assert "could not be delivered" in failed.stderr
    assert "secret-path" not in failed.stdout + failed.stderr
    webhook.status = 204
    assert ends(tmp_path, webhook, FAILS).returncode == 0
    assert ends(tmp_path, webhook, FAILS).returncode == 0
    assert webhook.states == ["fails"]


def test_an_alert_is_not_repeated_because_the_health_check_service_answers_nonsense(
    tmp_path: Path, webhook: Webhook
) -> None:
    class Nonsense(StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(b"nonsense\r\n")

    with ThreadingTCPServer(("127.0.0.1", 0), Nonsense) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        (tmp_path / "ALERT_PING_URL").write_text(f"http://127.0.0.1:{server.server_address[1]}/")
        for _run in range(2):
            done = ends(tmp_path, webhook, FAILS, "labelstation-doctor")
            assert done.returncode == 0, done.stderr
            assert "health-check service does not answer: BadStatusLine" in done.stderr
        server.shutdown()
    assert webhook.states == ["fails"]
