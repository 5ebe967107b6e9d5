"""A filter that makes what PostgreSQL keeps of a password."""

import hashlib
import hmac
from base64 import b64encode
from collections.abc import Callable

_ITERATIONS = 4096


def scram_verifier(password: str, salt: bytes) -> str:
    """What PostgreSQL keeps of a password of ASCII characters (RFC 5803, RFC 7677)."""
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, _ITERATIONS)
    stored_key = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    salt_text, stored, server = (b64encode(part).decode() for part in (salt, stored_key, server_key))
    return f"SCRAM-SHA-256${_ITERATIONS}:{salt_text}${stored}:{server}"


def scram_verifiers(passwords: dict[str, str]) -> dict[str, str]:
    """The verifiers of passwords, both by role, as ALTER ROLE takes them.

    The salt follows from role and password, so that a second deployment finds what it would set.
    """
    return {
        role: scram_verifier(password, hmac.digest(password.encode("ascii"), role.encode(), "sha256")[:16])
        for role, password in passwords.items()
    }


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[[dict[str, str]], dict[str, str]]]:
        """The filters of this role."""
        return {"scram_verifiers": scram_verifiers}
