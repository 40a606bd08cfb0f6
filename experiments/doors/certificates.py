"""Certificates of the experiments: an authority, a server and clients."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path


def make_folders(root: Path, clients: Sequence[str], host: str = "127.0.0.1") -> None:
    """Makes a folder for the server and for each client, and the file of their numbers.

    Args:
        root: Folder of all.
        clients: Names of the clients.
        host: IP address of the server.
    """
    root.mkdir(parents=True, exist_ok=True)
    (root / "names").write_text(f"subjectAltName = IP:{host}\n")
    key = "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
    _openssl(root, f"{key} -x509 -days 1 -subj /CN=authority -keyout ca.key -out ca.pem")
    for name in ("server", *clients):
        folder = root / name
        folder.mkdir(exist_ok=True)
        _openssl(root, f"{key} -subj /CN={name} -keyout {name}/key.pem -out {name}/request")
        signed = f"x509 -req -in {name}/request -CA ca.pem -CAkey ca.key -CAcreateserial -days 1"
        _openssl(root, f"{signed} -extfile names -out {name}/cert.pem")
        (folder / "ca.pem").write_bytes((root / "ca.pem").read_bytes())
    lines = [f"{name} = {number}" for number, name in enumerate(clients)]
    (root / "server" / "clients.toml").write_text("\n".join(['federation = "operator"', "[clients]", *lines]) + "\n")


def _openssl(folder: Path, arguments: str) -> None:
    subprocess.run(["openssl", *arguments.split()], cwd=folder, check=True, capture_output=True)
