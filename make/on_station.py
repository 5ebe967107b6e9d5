"""on_station.py INVENTORY VERB [OPTIONS]: run `labelstation VERB` on the station, over the inventory's SSH.

Output comes as it is written, and the exit code is the script's.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Read the connection from the inventory and become ssh."""
    inventory, verb, *options = sys.argv[1:]
    asked = subprocess.run(
        [Path(sys.executable).with_name("ansible-inventory"), "-i", inventory, "--list"],
        check=False,
        capture_output=True,
        text=True,
        # Told to say more, it would say it before the inventory.
        env={**os.environ, "ANSIBLE_VERBOSITY": "0"},
    )
    if asked.returncode != 0:
        sys.exit(asked.stderr)
    listed = json.loads(asked.stdout)
    hosts = listed.get("labelstation", {}).get("hosts", [])
    if len(hosts) != 1:
        print(f"{inventory}: group labelstation needs exactly one host, it has {len(hosts)}", file=sys.stderr)
        sys.exit(78)
    known = listed["_meta"]["hostvars"].get(hosts[0], {})
    command = ["ssh", "-q"]
    if sys.stdout.isatty():
        command.append("-t")
    for variable, option in (("ansible_port", "-p"), ("ansible_user", "-l"), ("ansible_ssh_private_key_file", "-i")):
        if variable in known:
            command += [option, str(known[variable])]
    command += shlex.split(known.get("ansible_ssh_common_args", ""))
    command += [str(known.get("ansible_host", hosts[0])), "--", shlex.join(["labelstation", verb, *options])]
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
