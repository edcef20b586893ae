"""The manager of bluesky-queueserver, patient with a worker that is busy.

As it comes (0.0.25), it takes a worker that does not answer within half a second for broken and calls the
plan that has just succeeded a failure; fitting or drawing on a loaded machine takes longer than that.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from typing import Any

from bluesky_queueserver.manager import start_manager
from bluesky_queueserver.manager.manager import RunEngineManager

PATIENCE_S = 10.0


class PatientManager(RunEngineManager):
    """Waits `PATIENCE_S` for an answer of the worker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._comm_to_worker_timeout = PATIENCE_S


def _leave_with(parent: int) -> None:
    """End this process group when the service that started it is gone: nobody else would."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    start_manager.WatchdogProcess = functools.partial(  # pyright: ignore[reportAttributeAccessIssue]
        start_manager.WatchdogProcess, cls_run_engine_manager=PatientManager
    )
    start_manager.start_manager()
