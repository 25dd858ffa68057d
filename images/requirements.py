"""Prints what the services need from outside, for `pip install -r`: python3 requirements.py ROOT EXTRA...

The base dependencies of the server and of the client, and those of the extras named. The distributions of this
repository themselves are left out: their folders are copied into the images.
"""

import sys
import tomllib
from pathlib import Path


def requirements(root: Path, extras: list[str]) -> list[str]:
    server = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    client = tomllib.loads((root / "clients/python/pyproject.toml").read_text())["project"]
    found = [*server["dependencies"], *client["dependencies"]]
    for extra in extras:
        found += server["optional-dependencies"][extra]
    return [requirement for requirement in found if requirement != client["name"]]


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in requirements(Path(sys.argv[1]), sys.argv[2:]))
