"""Bring up the queue: Redis, the manager with its worker, and for dry days the simulated beamline."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bcmi_beamline.queue.client import STATE_FILE, QueueClient, QueueError

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0

DEVICE_DEPTH = 2
"""Levels of devices a client is shown: circles and stages, not the fields of each motor record."""


class QueueService:
    """Everything a queue of plans needs, from ``with`` to the end of the block.

    Redis keeps the queue (the real server where one is installed, so that the queue survives a restart; else
    one within this process, which forgets). The manager opens the startup files of `profile` in a worker
    process, the same files that IPython runs. The simulated beamline, where asked for, is a process beside
    the worker: like the real one it outlives a lost worker.

    Parameters
    ----------
    directory : path
        The session's folder; the service keeps its files in ``queue`` in it.
    profile : path
        The ``startup`` folder of a profile collection.
    beamline : str or path
        Name or file of the beamline's configuration.
    simulate : str or path, optional
        Preset of the simulated beamline to start and stop with the queue.
    time_scale : float, optional
        Wall-clock seconds per second of the simulated beamline.

    Attributes
    ----------
    redis : str
        Which Redis it is, in words.
    twin : SimulatedBeamline or None

    Raises
    ------
    QueueError
        When a part does not come up, or the folder's queue is being served already.
    """

    def __init__(
        self,
        directory: str | Path,
        profile: str | Path,
        *,
        beamline: str | Path = "sim-id01",
        simulate: str | Path | None = None,
        time_scale: float | None = None,
    ) -> None:
        self.directory = Path(directory).absolute()
        self.profile = Path(profile).absolute()
        self.redis = "not started"
        self.twin: Any = None
        self._beamline = beamline
        self._simulate = simulate
        self._time_scale = time_scale
        self._stack = ExitStack()
        self._manager: subprocess.Popen[bytes] | None = None
        self._folder = self.directory / "queue"
        self.state_file = self._folder / STATE_FILE
        self.log = self._folder / "manager.log"

    def __enter__(self) -> QueueService:
        if not list(self.profile.glob("*.py")):
            raise QueueError(f"{self.profile} holds no startup files; name a profile's startup folder")
        if self.state_file.exists() and _is_running(json.loads(self.state_file.read_text())["pid"]):
            raise QueueError(f"{self.state_file}: this queue is being served already; stop that one first")
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _start(self) -> None:
        environment = os.environ | {
            "BCMI_BEAMLINE": str(self._beamline),
            "BCMI_DIRECTORY": str(self.directory),
        }
        environment.pop("BCMI_SIM", None)
        if self._simulate is not None:
            self._start_twin()
            environment |= {name: value for name, value in os.environ.items() if name.startswith("EPICS_")}
        control, info = (f"tcp://127.0.0.1:{_free_port()}" for _ in range(2))
        self._start_manager(self._start_redis(), control, info, environment)
        ports = {name: value for name, value in environment.items() if name.startswith("EPICS_")}
        state = {"pid": os.getpid(), "control": control, "info": info, "log": str(self.log)}
        state |= {"channel_access": ports}  # for clients that look at the same beamline
        beside = self.state_file.with_suffix(".part")
        beside.write_text(json.dumps(state, indent=1) + "\n")
        beside.replace(self.state_file)
        self._stack.callback(self.state_file.unlink, missing_ok=True)
        self._wait_for_manager()

    def _start_twin(self) -> None:
        from bcmi_beamline.sim.launch import SimulatedBeamline, claim_ports

        claim_ports()
        frames = self.directory / "frames"
        frames.mkdir(parents=True, exist_ok=True)
        assert self._simulate is not None
        self.twin = self._stack.enter_context(
            SimulatedBeamline(
                self._simulate, beamline=self._beamline, data_dir=frames, time_scale=self._time_scale
            )
        )

    def _start_redis(self) -> str:
        """Address of a running Redis."""
        port = _free_port()
        if program := shutil.which("redis-server"):
            options = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(self._folder)]
            options += ["--dbfilename", "queue.rdb", "--save", "1", "1"]
            self._run([program, *options], self._folder / "redis.log")
            self.redis = "redis-server, queue kept on disk"
        else:
            from fakeredis import TcpFakeServer

            server = TcpFakeServer(("127.0.0.1", port))
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
            self._stack.callback(server.shutdown)
            self.redis = "within this process, queue forgotten at its end (no redis-server is installed)"
        return f"127.0.0.1:{port}"

    def _start_manager(self, redis: str, control: str, info: str, environment: dict[str, str]) -> None:
        shutil.copy(self.profile / "user_group_permissions.yaml", self._folder)
        lists = self.profile / "existing_plans_and_devices.yaml"
        if lists.exists():
            shutil.copy(lists, self._folder)
        command = [sys.executable, "-m", "bcmi_beamline.queue._manager"]
        command += ["--startup-dir", str(self.profile), "--device-max-depth", str(DEVICE_DEPTH)]
        command += ["--existing-plans-devices", str(self._folder)]
        command += ["--user-group-permissions", str(self._folder)]
        command += ["--redis-addr", redis, "--redis-name-prefix", "bcmi"]
        command += ["--zmq-control-addr", control, "--zmq-info-addr", info, "--zmq-publish-console", "ON"]
        self._manager = self._run(command, self.log, environment)

    def _run(
        self, command: list[str], log: Path, environment: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own, so that Ctrl-C reaches this one first."""
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._stack.callback(_stop, process)
        return process

    def _wait_for_manager(self) -> None:
        assert self._manager is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._manager.poll() is not None:
                raise QueueError(f"the queue manager stopped at its start; see {self.log}")
            try:
                with QueueClient(self.directory) as client:
                    client.status()
            except QueueError:
                continue
            return
        raise QueueError(f"the queue manager did not answer within {START_TIMEOUT_S:g} s; see {self.log}")

    def close(self) -> None:
        """Abort what runs (its clean-up closes the shutter), close the worker, stop every part."""
        if self._manager is not None and self._manager.poll() is None and self.state_file.exists():
            try:
                with QueueClient(self.directory) as client:
                    client.shut_down()
            except QueueError as error:
                print(f"bcmi queue: {error}", file=sys.stderr)
        self._stack.close()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a process and all it has started."""
    for number, patience_s in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, STOP_TIMEOUT_S)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
        break
    process.wait()
