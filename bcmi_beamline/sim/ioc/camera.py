"""The near end of the process that makes the frames: it is started, asked, missed and started again."""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from bcmi_beamline.config import Beamline, Preset

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 10.0


class CameraLost(RuntimeError):
    """The process that makes the frames is gone; the message says how it ended."""


class Camera:
    """The process that makes the frames.

    Parameters
    ----------
    beamline : Beamline
    preset : Preset

    Attributes
    ----------
    nominal_pose : dict
        Readings the operator starts from, once started.
    on_lost : callable, optional
        Called with a `CameraLost` when the process dies by itself.
    """

    def __init__(self, beamline: Beamline, preset: Preset) -> None:
        self._configuration = beamline.model_dump_json(), preset.model_dump_json()
        self.nominal_pose: dict[str, float] = {}
        self.on_lost: Callable[[CameraLost], None] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Any = None
        self._ready: asyncio.Future[None] | None = None
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return self._process.pid if self._process is not None else None

    def launch(self) -> None:
        """Start the process; it gets ready by itself."""
        near, far = multiprocessing.Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bcmi_beamline.sim.ioc.camera_process", str(far.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[far.fileno()],
        )
        far.close()
        near.send(self._configuration)
        self._connection = near

    async def start(self) -> None:
        """Wait until the process, launched if need be, is ready.

        Raises
        ------
        ValueError
            In one line: why the experiment cannot be simulated.
        CameraLost
            When it ends before it is ready.
        """
        if self._process is None:
            self.launch()
        await self._listen()

    def _listen(self) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        assert self._connection is not None
        self._ready = loop.create_future()
        loop.add_reader(self._connection.fileno(), self._receive)
        return self._ready

    async def ask(self, name: str, *arguments: Any) -> Any:
        """Have a method of `FrameMaker` called.

        Raises
        ------
        OSError, RuntimeError
            What it raises.
        CameraLost
            When the process is gone, or goes before it has answered.
        """
        if self._ready is None:
            raise CameraLost("the process that makes the frames is not running")
        await asyncio.shield(self._ready)
        number = next(self._numbers)
        self._pending[number] = answer = asyncio.get_running_loop().create_future()
        assert self._connection is not None
        with suppress(OSError):  # it is gone: the reader tells
            self._connection.send((number, name, arguments))
        return await answer

    def _receive(self) -> None:
        assert self._connection is not None
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            self._lose()
            return
        assert self._ready is not None
        if not self._ready.done():
            self._greet(self._ready, message)
            return
        number, error, value = message
        answer = self._pending.pop(number)
        if answer.done():  # whoever asked has been cancelled
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(value)

    def _greet(self, ready: asyncio.Future[None], message: Any) -> None:
        if isinstance(message, ValueError):
            self._disconnect()
            ready.set_exception(message)
        else:
            self.nominal_pose = message
            ready.set_result(None)

    def _lose(self) -> None:
        """Take leave of a process that has died, tell everybody, and start another if it had ever run."""
        assert self._process is not None and self._ready is not None
        self._disconnect()
        status = self._process.wait(STOP_TIMEOUT_S)
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        lost = CameraLost(f"the process that makes the frames stopped ({how})")
        log.error("%s", lost)
        ran, self._ready = self._ready.done(), self._ready
        pending, self._pending = self._pending, {}
        if ran:
            self.launch()
            self._listen()
        else:
            self._ready.set_exception(lost)
            self._ready.exception()  # it may be that nobody waits
        for answer in pending.values():
            if not answer.done():
                answer.set_exception(lost)
        if ran and self.on_lost is not None:
            self.on_lost(lost)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            asyncio.get_running_loop().remove_reader(connection.fileno())
            connection.close()

    async def close(self) -> None:
        """Let the process close its files and end."""
        self._disconnect()
        self._ready = None
        process, self._process = self._process, None
        if process is None:
            return
        try:
            await asyncio.to_thread(process.wait, STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
