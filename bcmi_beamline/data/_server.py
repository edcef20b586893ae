"""The process that serves an embedded catalogue: one SQLite database and a folder, on loopback only.

Started by `bcmi_beamline.data.open_catalog` as ``python -m bcmi_beamline.data._server`` with its settings,
one JSON object, as the first line of standard input; it leaves when standard input closes, so it never
outlives its parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import sys
import threading
from pathlib import Path
from typing import Any


def configuration(directory: Path, readable: list[str], api_key: str) -> dict[str, Any]:
    """Settings of a Tiled server that databroker and the Bluesky clients recognise.

    Parameters
    ----------
    directory : Path
        Holds ``catalog.db`` (runs), ``tables.db`` (events) and ``data`` (arrays).
    readable : list of str
        Folders that detectors write into.
    api_key : str
    """
    return {
        "authentication": {"allow_anonymous_access": False, "single_user_api_key": api_key},
        "trees": [
            {
                "tree": "catalog",
                "path": "/",
                "args": {
                    "uri": f"sqlite:///{directory}/catalog.db",
                    "init_if_not_exists": not _is_initialised(directory / "catalog.db"),
                    "writable_storage": [f"{directory}/data", f"sqlite:///{directory}/tables.db"],
                    "readable_storage": readable,
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


def _leave_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


def serve() -> None:
    """Serve until standard input closes; the listening socket is inherited."""
    settings = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_parent, daemon=True).start()

    config = configuration(Path(settings["directory"]), settings["readable"], settings["api_key"])

    import uvicorn
    from tiled.server.app import build_app_from_config

    app = build_app_from_config(config)
    listener = socket.socket(fileno=settings["socket"])
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
    server.run(sockets=[listener])


if __name__ == "__main__":
    serve()
