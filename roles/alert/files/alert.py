#!/usr/bin/python3
"""alert.py UNIT: say once that a job of the station has begun to fail, and once that it works again.

systemd starts it after every run of a job, with how the run ended in its environment (systemd.exec(5), MONITOR_*).
What was said last is remembered; only a change is said. If it cannot be said everywhere, it counts as unsaid.
"""

import json
import os
import smtplib
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from email.message import EmailMessage
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

TRY_AGAIN = "75"
TIMEOUT_SECONDS = 20
MEANINGS = {
    "1": "an unexpected error: a developer should see the journal",
    "3": "some items failed and are listed in the journal",
    "4": "a person must decide",
    "75": "something it needs has been down for a while",
    "78": "a setting or credential is missing or wrong",
}


def journal(unit: str) -> str:
    """The last lines that the job wrote."""
    return subprocess.run(
        ["journalctl", "--unit", unit, "--lines=20", "--output=cat", "--no-pager"],
        check=False, capture_output=True, text=True,
    ).stdout  # fmt: skip


def secret(name: str) -> str:
    """A credential; empty when it is not configured."""
    place = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent")) / name
    return place.read_text().strip() if place.exists() else ""


def send_mail(subject: str, text: str) -> None:
    """Send to ALERT_MAIL_TO, when there is one."""
    if not os.environ.get("ALERT_MAIL_TO"):
        return
    message = EmailMessage()
    message["Subject"] = subject
    message["From"] = os.environ["ALERT_MAIL_FROM"]
    message["To"] = os.environ["ALERT_MAIL_TO"]
    message.set_content(text)
    host, port = os.environ["ALERT_SMTP_HOST"], int(os.environ["ALERT_SMTP_PORT"])
    with smtplib.SMTP(host, port, timeout=TIMEOUT_SECONDS) as server:
        server.send_message(message)


def post(subject: str, text: str, state: str) -> None:
    """Post to the webhook, when there is one."""
    url = secret("ALERT_WEBHOOK_URL")
    if not url:
        return
    body = json.dumps({"text": f"{subject}\n{text}", "subject": subject, "state": state}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS).close()


def ping(unit: str, state: str) -> None:
    """Tell the health-check service after each run of doctor, which is the job that sees the whole station."""
    url = secret("ALERT_PING_URL")
    if url and unit.startswith("labelstation-doctor"):
        urllib.request.urlopen(url + ("" if state == "works" else "/fail"), timeout=TIMEOUT_SECONDS).close()


def main() -> int:
    """Compare with what was said last, and say the difference."""
    unit = sys.argv[1]
    result, status = os.environ["MONITOR_SERVICE_RESULT"], os.environ["MONITOR_EXIT_STATUS"]
    memory = Path(os.environ["STATE_DIRECTORY"]) / f"{unit}.json"
    before: dict[str, Any] = json.loads(memory.read_text()) if memory.exists() else {"state": "works", "tries": 0}
    failing = result != "success"
    tries = int(before["tries"]) + 1 if failing and status == TRY_AGAIN else 0
    patience = int(os.environ["ALERT_TRIES"])
    state = "works"
    if failing and (status != TRY_AGAIN or tries >= patience or before["state"] == "fails"):
        state = "fails"

    faults = []
    if state != before["state"]:
        host = socket.gethostname()
        subject = f"{unit} on {host} " + ("works again" if state == "works" else "fails")
        reason = MEANINGS.get(status, f"exit status {status}") if result == "exit-code" else result
        text = "" if state == "works" else f"It ended with: {reason}.\n\n{journal(f'{unit}.service')}"
        print(f"{'<5>' if state == 'works' else '<3>'}ALERT {subject}", flush=True)
        deliveries: tuple[Callable[[], None], ...] = (
            partial(send_mail, subject, text),
            partial(post, subject, text, state),
        )
        for deliver in deliveries:
            try:
                deliver()
            except (OSError, HTTPException) as error:
                # Without the address: it can be a secret.
                detail = getattr(error, "reason", None) or getattr(error, "strerror", None) or ""
                faults.append(f"{type(error).__name__}: {detail}")
    try:
        ping(unit, state)
    except (OSError, HTTPException) as error:
        print(f"<4>the health-check service does not answer: {type(error).__name__}", file=sys.stderr)
    for fault in faults:
        print(f"<3>the alert could not be delivered: {fault}", file=sys.stderr)
    unfinished = memory.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"state": before["state"] if faults else state, "tries": tries}))
    unfinished.rename(memory)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
