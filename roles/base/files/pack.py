"""Pack folders of the checkout into one archive: pack.py CHECKOUT FOLDER...

Prints a digest of names and contents, the same for the same files, and where the archive lies.
"""

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

LEFT_OUT = {"__pycache__", ".mypy_cache", ".ruff_cache"}


def main() -> None:
    """Write the archive below .local/ unless that very archive is there already."""
    checkout = Path(sys.argv[1])
    files = [
        path
        for folder in sys.argv[2:]
        for path in sorted((checkout / folder).rglob("*"))
        if path.is_file() and not LEFT_OUT.intersection(path.parts)
    ]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for path in files:
            content = path.read_bytes()
            member = tarfile.TarInfo(path.relative_to(checkout).as_posix())
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
    digest = hashlib.sha256(packed.getvalue()).hexdigest()[:12]
    place = checkout / ".local/releases" / f"release-{digest}.tar"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = place.with_suffix(".unfinished")
        unfinished.write_bytes(packed.getvalue())
        unfinished.rename(place)
    print(json.dumps({"digest": digest, "archive": str(place)}))


if __name__ == "__main__":
    main()
