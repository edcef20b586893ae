"""Room on the disks: no run starts without it, and a run waits, beam off, while there is none."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

from bluesky import Msg
from bluesky import plan_stubs as bps

logger = logging.getLogger(__name__)

RESERVE_BYTES = 2e9
"""What is kept free: frames under way, documents, the catalogue."""
LOOK_EVERY_S = 1.0

Plan = Generator[Msg, Any, Any]


class NoRoomError(RuntimeError):
    """A disk has no room for what is about to be measured; one line says which and how much."""


class DiskWatch:
    """RunEngine preprocessor: ``RE.preprocessors.append(DiskWatch(...))``.

    A detector that is prepared for more frames than there is room for is an error before the run begins.
    Before each trigger the reserve is looked at: where it is gone the shutter is closed, the plan waits, and
    goes on by itself when somebody has made room.

    Parameters
    ----------
    folders : callable
        Returns the folders that are written to; those not on this machine are left out.
    frame_bytes : float
        Expected size of one frame on disk.
    reserve_bytes : float
        Free space below which nothing more is taken, on each disk.
    shutter : device, optional
        Set to 0 while the plan waits, then back to what it was.
    """

    def __init__(
        self,
        folders: Callable[[], Iterable[Path]],
        frame_bytes: float,
        *,
        reserve_bytes: float = RESERVE_BYTES,
        shutter: Any = None,
    ) -> None:
        self._folders = folders
        self.frame_bytes = frame_bytes
        self.reserve_bytes = reserve_bytes
        self._shutter = shutter
        self._looked = 0.0

    def __call__(self, plan: Plan) -> Plan:
        """Wrap `plan`; errors are raised inside it, so that it cleans up as after any other."""
        answer, error = None, None
        while True:
            try:
                msg = plan.send(answer) if error is None else plan.throw(error)
            except StopIteration as end:
                return end.value
            answer, error = None, None
            try:
                if msg.command == "prepare":
                    self.check(getattr(msg.args[0], "frames", 0) * self.frame_bytes)
                elif msg.command == "trigger":
                    yield from self._wait_for_room()
                answer = yield msg
            except GeneratorExit:
                plan.close()
                raise
            except Exception as caught:
                error = caught

    def check(self, needed_bytes: float) -> None:
        """Refuse what there is no room for.

        Raises
        ------
        NoRoomError
        """
        if lacking := self._lacking(needed_bytes + self.reserve_bytes):
            folder, free = lacking
            raise NoRoomError(
                f"{folder}: {free / 1e9:.2f} GB are free, the frames need {needed_bytes / 1e9:.2f} GB and "
                f"{self.reserve_bytes / 1e9:.2f} GB are kept free; make room or choose another disk"
            )

    def _lacking(self, wanted: float) -> tuple[Path, float] | None:
        """The first folder with less than `wanted` bytes free, and how many are."""
        for folder in self._folders():
            home = next((path for path in (folder, *folder.parents) if path.exists()), None)
            free = shutil.disk_usage(home).free if home else wanted
            if free < wanted:
                return folder, free
        return None

    def _wait_for_room(self) -> Plan:
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        lacking = self._lacking(self.reserve_bytes)
        if lacking is None:
            return
        folder, free = lacking
        logger.error(
            "%s: only %.2f GB are free; the scan waits, make room and it goes on by itself",
            folder,
            free / 1e9,
        )
        was = 0 if self._shutter is None else (yield from bps.rd(self._shutter))
        if was:
            yield from bps.mv(self._shutter, 0)
        while self._lacking(self.reserve_bytes):
            yield from bps.sleep(LOOK_EVERY_S)
        if was:
            yield from bps.mv(self._shutter, was)
        logger.warning("%s: there is room again, the scan goes on", folder)
