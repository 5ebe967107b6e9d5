#!/usr/bin/env python3
"""Write what each script's --help says into docs/commands.md, between that script's markers."""

import os
import re
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PAGE = PROJECT / "docs" / "commands.md"
# Wide enough for the longest option, narrow enough for a page.
COLUMNS = 100


def help_of(script: str) -> str:
    """What a script says about itself."""
    return subprocess.run(
        [sys.executable, str(PROJECT / "scripts" / f"{script}.py"), "--help"],
        env={"PATH": os.environ["PATH"], "COLUMNS": str(COLUMNS)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def updated(page: str) -> str:
    """The page with the text between each pair of markers as it must be."""
    return re.sub(
        r"(<!-- help of (\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}```\n{help_of(found[2])}```\n{found[3]}",
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
