"""The process that serves a catalogue: one database and a folder.

An embedded one is started by `bcmi_beamline.data.open_catalog` as ``python -m bcmi_beamline.data._server``
with its settings, one JSON object, as the first line of standard input; it leaves when standard input closes,
so it never outlives its parent. ``bcmi serve`` runs the same as a service, with `serve`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sqlite3
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bcmi_beamline.data._hdf5 import file_error

SECTIONS = "authentication", "database", "access_control"
"""What a service takes from a Tiled configuration file; the rest is ours."""


def configuration(
    directory: Path, readable: Iterable[str], api_key: str | None, database: str | None = None
) -> dict[str, Any]:
    """Settings of a Tiled server that databroker and the Bluesky clients recognise.

    Parameters
    ----------
    directory : Path
        Holds ``data`` (arrays) and, without `database`, ``catalog.db`` (runs) and ``tables.db`` (events).
    readable : iterable of str
        Folders that detectors write into.
    api_key : str, optional
        Of the single user; None where users are many.
    database : str, optional
        ``postgresql://...`` for runs and events.
    """
    runs, events = database, database
    if database is None:
        runs, events = f"sqlite:///{directory}/catalog.db", f"sqlite:///{directory}/tables.db"
    return {
        "authentication": {"allow_anonymous_access": False}
        | ({"single_user_api_key": api_key} if api_key else {}),
        "trees": [
            {
                "tree": "catalog",
                "path": "/",
                "args": {
                    "uri": runs,
                    "init_if_not_exists": bool(database) or not _is_initialised(directory / "catalog.db"),
                    "writable_storage": [f"{directory}/data", events],
                    "readable_storage": list(readable),
                    "specs": [{"name": "CatalogOfBlueskyRuns", "version": "3.0"}],
                },
            }
        ],
        "media_types": {
            "BlueskyRun": {"application/json-seq": "bluesky_tiled_plugins.exporters:json_seq_exporter"}
        },
    }


def _is_initialised(database: Path) -> bool:
    """Whether the tables are there; Tiled takes 3 s to look, and stamps the database last."""
    if not database.exists():
        return False
    with contextlib.closing(sqlite3.connect(database)) as connection:
        try:
            return connection.execute("SELECT count(*) FROM alembic_version").fetchone()[0] > 0
        except sqlite3.OperationalError:
            return False


def with_users(config: dict[str, Any], directory: Path, settings: Path) -> dict[str, Any]:
    """Return `config` for many users, who log in as the Tiled configuration file `settings` says.

    Sessions are signed with ``secret_key`` in `directory`, and users kept in ``users.db`` there, unless the
    file says otherwise.

    Raises
    ------
    FileError
        When the file is no such configuration.
    """
    import yaml

    try:
        found = yaml.safe_load(settings.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise file_error(settings, "file", f"cannot be read ({text})", "name a Tiled configuration") from None
    if not isinstance(found, dict) or not (found.get("authentication") or {}).get("providers"):
        raise file_error(settings, "authentication.providers", "is missing", "say how users log in")
    if other := sorted(set(found) - set(SECTIONS)):
        raise file_error(settings, other[0], "is set by bcmi", f"keep {', '.join(SECTIONS)} only")
    key = directory / "secret_key"
    if not key.exists():
        with open(os.open(key, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    authentication = {"secret_keys": [key.read_text()], "allow_anonymous_access": False}
    database = {"uri": f"sqlite:///{directory}/users.db", "init_if_not_exists": True}
    return {
        **config,
        **found,
        "authentication": authentication | found["authentication"],
        "database": database | (found.get("database") or {}),
    }


def serve(config: dict[str, Any], listener: socket.socket) -> None:
    """Serve `config` on `listener` until the process is asked to leave.

    Raises
    ------
    ValueError
        In one line, when Tiled refuses the configuration.
    """
    import uvicorn
    from tiled.server.app import build_app_from_config

    try:
        app = build_app_from_config(config)
    except Exception as error:
        raise ValueError(f"the catalogue cannot be served: {' '.join(str(error).split())}") from None
    uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on")).run(sockets=[listener])


def _leave_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


def _serve_parent() -> None:
    """Serve until standard input closes; the listening socket is inherited."""
    settings = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    config = configuration(
        Path(settings["directory"]), settings["readable"], settings["api_key"], settings["database"]
    )
    serve(config, socket.socket(fileno=settings["socket"]))


if __name__ == "__main__":
    _serve_parent()
