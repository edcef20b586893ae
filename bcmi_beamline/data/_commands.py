"""What ``bcmi serve`` and ``bcmi replay`` do."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

from bcmi_beamline.data._hdf5 import FileError
from bcmi_beamline.data._server import configuration, serve, with_users
from bcmi_beamline.data.catalog import CatalogError, open_catalog
from bcmi_beamline.data.documents import DocumentLog

Say = Callable[[str], None]


def serve_catalog(
    directory: Path,
    say: Say,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    readable: Iterable[Path] = (),
    users: Path | None = None,
) -> None:
    """Serve the catalogue of a session's folder until the process is interrupted.

    Parameters
    ----------
    directory : Path
        The session's folder; the catalogue is in ``catalog`` below it, or in the PostgreSQL database that
        ``BCMI_CATALOG`` names.
    say : callable
        Told where it listens and, with one user, the key; ``TILED_SINGLE_USER_API_KEY`` sets that.
    readable : iterable of Path
        Folders that detectors write into; ``frames`` in the session's folder is always one.
    users : Path, optional
        A Tiled configuration file that says how users log in; a single user with a key without.

    Raises
    ------
    ValueError, FileError
        In one line: an address that cannot be used, a configuration that Tiled refuses.
    """
    folder = directory.absolute() / "catalog"
    (folder / "data").mkdir(parents=True, exist_ok=True)
    database = os.environ.get("BCMI_CATALOG") or None
    if database and not database.startswith("postgresql"):
        raise ValueError(
            f"BCMI_CATALOG is {database}, served elsewhere; unset it, or name a PostgreSQL database"
        )
    api_key = None
    if users is None:
        api_key = os.environ.get("TILED_SINGLE_USER_API_KEY") or secrets.token_hex(32)
    folders = [str(Path(path).absolute()) for path in (directory / "frames", *readable)]
    config = configuration(folder, folders, api_key, database)
    if users is not None:
        config = with_users(config, folder, users)
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise ValueError(
            f"{host}:{port}: {os.strerror(error.errno or 0)}; choose another --host or --port"
        ) from None
    with listener:
        say(f"serving {folder}: http://{host}:{listener.getsockname()[1]}  (Ctrl-C stops)")
        say(f"TILED_API_KEY={api_key}" if api_key else f"users log in as {users} says")
        serve(config, listener)


def replay_runs(directory: Path, runs: list[str], say: Say) -> tuple[int, list[str]]:
    """Store the logged runs of a session's folder that its catalogue does not hold whole.

    Parameters
    ----------
    directory : Path
        The session's folder.
    runs : list of str
        Beginnings of uids; every logged run where empty.
    say : callable
        Told of each run.

    Returns
    -------
    stored : int
    problems : list of str
        One line for each run that could not be stored.

    Raises
    ------
    FileError
        When there is no such log.
    CatalogError
        When the catalogue does not answer.
    """
    log = DocumentLog(directory / "documents")
    paths = [log.path(run) for run in runs] if runs else log.paths()
    if not paths:
        raise FileError(f"{log.directory}: holds no document log; name the session's folder with --directory")
    stored, problems = 0, []
    with open_catalog(directory / "catalog", readable=[Path("/")]) as catalog:
        len(catalog)  # one that does not answer is one error, not one a run
        for path in paths:
            try:
                new = catalog.restore(path)
            except (FileError, CatalogError) as error:
                problems.append(str(error))
                continue
            stored += new
            say(f"{path.stem.split('_', 1)[-1]}: {'stored' if new else 'was there'}")
    return stored, problems
