"""The process that makes the frames and writes them, so that nothing keeps Channel Access waiting.

Requests and answers are small and go through a socket pair; a frame never leaves this process. It ends, with
its files closed, when the other end of the pair does.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bcmi_beamline.config import Beamline, Preset
from bcmi_beamline.sim.ioc.series import Series, SeriesSettings, Stored
from bcmi_beamline.sim.twin import Twin

NICENESS = 2
"""Channel Access, in the other process, goes first."""

SWITCH_INTERVAL_S = 0.001
"""Work hands the interpreter over this soon, so that a reading waits for no frame."""


class FrameMaker:
    """The twin and the files of the series under way.

    Parameters
    ----------
    twin : Twin
    """

    readings = ("flux", "ring_current", "temperatures", "depth")
    """Requests that do not wait for frames."""

    def __init__(self, twin: Twin) -> None:
        self._twin = twin
        self._series: Series | None = None
        self._packed: bytes | None = None

    # -- readings -----------------------------------------------------------------------------------
    def flux(self, time_s: float, pose: Mapping[str, float]) -> float:
        """Incident flux, photons/s."""
        return self._twin.flux(time_s, pose)

    def ring_current(self, time_s: float) -> float:
        """MA."""
        return self._twin.ring_current(time_s)

    def temperatures(self, time_s: float) -> dict[str, float]:
        """Temperatures by name, deg C."""
        return dict(self._twin.temperatures(time_s))

    def depth(self, exposure_s: float) -> tuple[int, int]:
        """Bits of a pixel, and counts at which one saturates."""
        detector = self._twin.detector
        return detector.bit_depth(exposure_s), detector.count_cutoff(exposure_s)

    # -- frames -------------------------------------------------------------------------------------
    def arm(self, stem: Path, settings: SeriesSettings) -> Stored:
        """Begin a series.

        Raises
        ------
        OSError
            One line: the file and why it cannot be written.
        """
        self.disarm()
        self._series = Series(stem, settings, self._twin.detector.pixel_mask)
        return self._stored(self._series)

    def expose(self, pose: Mapping[str, float], exposure_s: float, time_s: float) -> None:
        """Make a frame and keep it, ready for the file; one that is not stored is lost."""
        self._packed = None
        frame = self._twin.frame(pose, exposure_s, time_s)
        if self._series is not None:
            self._packed = self._series.pack(frame)

    def store(self, disk_full: bool = False) -> Stored:
        """Write the frame that was made last.

        Raises
        ------
        OSError
            When the disk does not take it.
        """
        series, packed = self._series, self._packed
        assert series is not None and packed is not None
        if disk_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(series.current_file))
        series.append(packed)
        return self._stored(series)

    def disarm(self) -> None:
        """End the series and close its files."""
        series, self._series = self._series, None
        if series is not None:
            series.close()

    def recover(self, stem: Path, settings: SeriesSettings) -> int:
        """Mend the files that a process killed in the middle of a series has left; returns their frames."""
        series = Series(stem, settings, self._twin.detector.pixel_mask, resume=True)
        series.close()
        return series.frames

    @staticmethod
    def _stored(series: Series) -> Stored:
        return Stored(series.frames, str(series.current_file))


def _answer(connection: Connection, lock: threading.Lock, number: int, work: Callable[[], Any]) -> None:
    try:
        answer = (number, None, work())
    except OSError as error:
        answer = (number, OSError(str(error)), None)
    except Exception as error:
        answer = (number, RuntimeError(f"{type(error).__name__}: {error}"), None)
    with lock:
        connection.send(answer)


def serve(connection: Connection, maker: FrameMaker) -> None:
    """Answer requests until the other end is closed: readings at once, all else one after another."""
    lock = threading.Lock()
    with ThreadPoolExecutor(1, thread_name_prefix="frames") as worker:
        while True:
            try:
                number, name, arguments = connection.recv()
            except (EOFError, OSError):
                break
            method = getattr(maker, name)

            def work(method=method, arguments=arguments):
                return method(*arguments)

            if name in FrameMaker.readings:
                _answer(connection, lock, number, work)
            else:
                worker.submit(_answer, connection, lock, number, work)
        worker.shutdown(cancel_futures=True)
    maker.disarm()


def main(descriptor: int) -> None:
    """Say hello with the nominal pose, or why the experiment cannot be simulated; then serve."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the other process decides when it is over
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    connection = Connection(descriptor)
    beamline, preset = connection.recv()
    try:
        twin = Twin(Beamline.model_validate_json(beamline), Preset.model_validate_json(preset))
    except (ValueError, OSError) as error:
        connection.send(ValueError(" ".join(str(error).split())))
        return
    connection.send(twin.nominal_pose())
    serve(connection, FrameMaker(twin))


if __name__ == "__main__":
    main(int(sys.argv[1]))
