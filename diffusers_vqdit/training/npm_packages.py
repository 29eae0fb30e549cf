"""Packages of npm that data are made from."""

import subprocess
import tarfile
from pathlib import Path


def open_package(package: str, folder: Path) -> tarfile.TarFile:
    """Open the tarball of a package of npm, such as ``"@scope/name@1.0.0"``, fetching it into `folder` with ``npm``
    where it isn't there."""
    name, version = package.rsplit("@", 1)
    path = folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        # npm prints the file's name, which is known.
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return tarfile.open(path)
