"""Start the simulated beamline beside this process, wait until it answers, and leave nothing behind."""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from bcmi_beamline.config import Beamline, Preset, load_beamline, load_preset

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0

_SINGLE_THREADED = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)
"""One worker makes the frames; more threads would only make Channel Access wait."""

_claimed: list[int] = []


class LaunchError(RuntimeError):
    """The simulated beamline did not start; the message ends with the last lines of its log."""


def _free_port() -> int:
    """A port of the loopback interface that is free for UDP and for TCP."""
    for _ in range(100):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, socket.socket() as tcp:
            udp.bind(("127.0.0.1", 0))
            port = udp.getsockname()[1]
            try:
                tcp.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise LaunchError("no port of 127.0.0.1 is free for both UDP and TCP")


def _channel_access_started() -> bool:
    ca = sys.modules.get("epics.ca")
    return ca is not None and ca.libca is not None


def claim_ports() -> int:
    """Point Channel Access of this process and its children at free loopback ports.

    Call it before ophyd or epics is imported, since libca reads its environment once. Later calls change
    nothing.

    Returns
    -------
    int
        Port of the server.

    Raises
    ------
    LaunchError
        When libca has started already.
    """
    if not _claimed:
        if _channel_access_started():
            raise LaunchError("call claim_ports() before ophyd or epics is imported: libca has started")
        _claimed.append(_free_port())
        port = str(_claimed[0])
        os.environ |= {
            "EPICS_CA_ADDR_LIST": "127.0.0.1",
            "EPICS_CA_AUTO_ADDR_LIST": "NO",
            "EPICS_CA_SERVER_PORT": port,
            "EPICS_CA_REPEATER_PORT": str(_free_port()),
            "EPICS_CA_MAX_ARRAY_BYTES": "20000000",
            "EPICS_CAS_SERVER_PORT": port,
            "EPICS_CAS_INTF_ADDR_LIST": "127.0.0.1",
            "EPICS_CAS_AUTO_BEACON_ADDR_LIST": "NO",
        }
        os.environ.pop("EPICS_CAS_BEACON_ADDR_LIST", None)
    return _claimed[0]


class SimulatedBeamline:
    """The simulated beamline in a process of its own, from ``with`` to the end of the block.

    Ctrl-C in the terminal does not reach that process, so that plans can still close the shutter; it stops
    with the block, at the latest when this process is gone. Only one per process answers on the ports
    claimed.

    Parameters
    ----------
    preset : str, path or Preset
        The experiment that is simulated.
    beamline : str, path or Beamline
        The beamline that is simulated.
    data_dir : path
        Where the Eiger writes; the process' own log goes to ``ioc/ioc.log`` in it.
    time_scale : float, optional
        Wall-clock seconds per second of exposure and motion; the preset's where absent.

    Attributes
    ----------
    log : Path
        What the process says.
    beamline : Beamline
    preset : Preset
    data_dir : Path

    Raises
    ------
    ConfigError
        When a configuration cannot be used.
    LaunchError
        From `start` (or ``with``), when the process dies or does not answer.
    """

    def __init__(
        self,
        preset: str | Path | Preset = "small",
        beamline: str | Path | Beamline = "sim-id01",
        *,
        data_dir: str | Path,
        time_scale: float | None = None,
    ) -> None:
        self.preset = preset if isinstance(preset, Preset) else load_preset(preset)
        self.beamline = beamline if isinstance(beamline, Beamline) else load_beamline(beamline)
        self.data_dir = Path(data_dir).absolute()
        self.log = self.data_dir / "ioc" / "ioc.log"
        self._time_scale = time_scale
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, while it is running."""
        return None if self._process is None else self._process.pid

    def start(self) -> SimulatedBeamline:
        """Start the process and wait until it answers."""
        claim_ports()
        folder = self.log.parent
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "bcmi_beamline.sim.ioc", "--data-dir", str(self.data_dir)]
        for name, model in (("preset", self.preset), ("beamline", self.beamline)):
            file = folder / f"{name}.json"
            file.write_text(model.model_dump_json(indent=1))
            command += [f"--{name}", str(file)]
        if self._time_scale is not None:
            command += ["--time-scale", str(self._time_scale)]
        command += ["--parent", str(os.getpid())]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=os.environ | _SINGLE_THREADED,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        atexit.register(self.close)
        try:
            self._wait_until_it_answers(self._process)
        except BaseException:
            self.close()
            raise
        return self

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        from caproto import CaprotoError
        from caproto.sync.client import read

        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise LaunchError(f"the simulated beamline stopped at its start; {self._last_words()}")
            try:
                read(self.beamline.prefix + "Sim:TimeScale", timeout=0.3, repeater=False)
            except (CaprotoError, OSError, TimeoutError):
                continue
            return
        raise LaunchError(
            f"the simulated beamline did not answer within {START_TIMEOUT_S:g} s; {self._last_words()}"
        )

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-8:]
        return f"{self.log} ends with:\n" + "\n".join(lines)

    def close(self) -> None:
        """Stop the process and wait until it is gone; may be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self.close)
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> SimulatedBeamline:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
