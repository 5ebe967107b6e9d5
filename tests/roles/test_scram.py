"""The filter that makes what PostgreSQL keeps of a password."""

import runpy
from base64 import b64decode
from pathlib import Path

from support import Connection

PLUGIN = runpy.run_path(str(Path(__file__).resolve().parents[2] / "roles/postgres/filter_plugins/scram.py"))


def test_it_is_what_postgresql_makes_itself(db: Connection) -> None:
    made = db.pgconn.encrypt_password(b"sesame-open-12", b"labelstation", b"scram-sha-256").decode()
    salt = made.removeprefix("SCRAM-SHA-256$4096:").partition("$")[0]
    assert PLUGIN["scram_verifier"]("sesame-open-12", b64decode(salt)) == made


def test_it_stays_the_same_and_tells_nobody_that_two_passwords_are_one() -> None:
    passwords = {"labelstation": "sesame-open-12", "label_studio": "sesame-open-12"}
    made = PLUGIN["scram_verifiers"](passwords)
    assert PLUGIN["scram_verifiers"](passwords) == made
    assert made["labelstation"] != made["label_studio"]
