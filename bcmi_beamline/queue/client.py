"""Talk to a served queue: submit, start, watch, stop, and read what plans have found."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STATE_FILE = "service.json"

OPEN_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0

USER, GROUP = "bcmi", "primary"


class QueueError(RuntimeError):
    """The queue refused or did not answer; the message is one line that says what to do."""


class QueueClient:
    """A client of the queue that is served in a session's folder.

    Parameters
    ----------
    directory : path
        The session's folder; ``queue/service.json`` in it holds the addresses.

    Raises
    ------
    QueueError
        When no queue is served there; from every method, when the manager refuses or does not answer.
    """

    def __init__(self, directory: str | Path) -> None:
        from bluesky_queueserver_api.zmq import REManagerAPI

        file = Path(directory) / "queue" / STATE_FILE
        try:
            state = json.loads(file.read_text())
        except (OSError, ValueError):
            raise QueueError(f"no queue is served in {directory}; start one with: bcmi queue serve") from None
        self._log = state["log"]
        self._api: Any = REManagerAPI(zmq_control_addr=state["control"], zmq_info_addr=state["info"])
        self._api.user, self._api.user_group = USER, GROUP

    def __enter__(self) -> QueueClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self._api.close()

    # -- looking ------------------------------------------------------------------------------------
    def status(self) -> dict[str, Any]:
        """What manager and worker are doing."""
        with self._explained():
            return self._api.status(reload=True)

    def items(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The plan that runs (empty when none does) and those that wait."""
        with self._explained():
            answer = self._api.queue_get()
        return answer["running_item"], answer["items"]

    def history(self) -> list[dict[str, Any]]:
        """Plans that have ended, oldest first, each with its ``result``."""
        with self._explained():
            return self._api.history_get()["items"]

    def results(self) -> dict[str, Any]:
        """What each plan found when it last succeeded, by plan."""
        with self._explained():
            answer = self._api.send_request(method="re_metadata")
        return answer["re_metadata"].get("results", {})

    # -- doing --------------------------------------------------------------------------------------
    def submit(self, plan: str, arguments: dict[str, Any] | None = None, first: bool = False) -> str:
        """Put one plan into the queue; the manager checks its parameters.

        Returns
        -------
        str
            Uid of the item.
        """
        item = {"item_type": "plan", "name": plan, "kwargs": arguments or {}}
        with self._explained():
            answer = self._api.item_add(item, pos="front" if first else "back")
        return answer["item"]["item_uid"]

    def clear(self) -> None:
        """Take every waiting plan out of the queue."""
        with self._explained():
            self._api.queue_clear()

    def open(self, timeout_s: float = OPEN_TIMEOUT_S) -> None:
        """Open the worker's session, where it is not open."""
        if self.status()["worker_environment_exists"]:
            return
        with self._explained():
            self._api.environment_open()
            self._api.wait_for_idle(timeout=timeout_s)
        if not self.status()["worker_environment_exists"]:
            raise QueueError(f"the worker could not open the session: {_last_error(self._log)}")

    def start(self) -> None:
        """Run what is queued, opening the session first where needed."""
        self.open()
        with self._explained():
            self._api.queue_start()

    def stop(self) -> None:
        """Let the running plan finish and start no other."""
        with self._explained():
            self._api.queue_stop()

    def abort(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Abort the running plan now; its clean-up leaves the hardware safe, and the queue stops."""
        deadline = time.monotonic() + timeout_s
        with self._explained():
            while (state := self.status())["manager_state"] not in ("idle", "paused"):
                if state["re_state"] == "running":
                    self._api.re_pause(option="immediate")
                    self._api.wait_for_idle_or_paused(timeout=timeout_s)
                elif time.monotonic() > deadline:
                    raise QueueError(f"the running plan cannot be aborted; see {self._log}")
                else:
                    time.sleep(0.1)  # between two plans, or before the first
            if state["manager_state"] == "paused":
                self._api.re_abort()
                self._api.wait_for_idle(timeout=timeout_s)

    def recover(self) -> None:
        """Replace a worker that has died or hangs, and make the hardware safe.

        The shutter is closed, motors stopped, the detector disarmed. The queue is kept, with the plan that
        was broken off at its front.
        """
        with self._explained():
            if self.status()["worker_environment_exists"]:
                self._api.environment_destroy()
                self._api.wait_for_idle(timeout=STOP_TIMEOUT_S)
        self.open()
        with self._explained():
            self._api.item_execute({"item_type": "plan", "name": "make_safe"})
            self._api.wait_for_idle(timeout=STOP_TIMEOUT_S)
        result = self.history()[-1]["result"]
        if result["exit_status"] != "completed":
            raise QueueError(f"the hardware could not be made safe: {_first_line(result['msg'])}")

    def shut_down(self) -> None:
        """Abort what runs and close the worker's session."""
        status = self.status()
        if not status["worker_environment_exists"]:
            return
        if status["manager_state"] != "idle":
            self.abort()
        with self._explained():
            self._api.environment_close()
            self._api.wait_for_idle(timeout=STOP_TIMEOUT_S)

    def wait(
        self, on_line: Callable[[str], None] | None = None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Follow the queue until it rests.

        Parameters
        ----------
        on_line : callable, optional
            Takes each line that the worker prints.
        timeout_s : float, optional
            None: for ever.

        Returns
        -------
        dict
            The last item of the history, with its ``result``; empty where nothing has run.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if on_line is not None:
            self._api.console_monitor.enable()
        try:
            while self.status()["manager_state"] not in ("idle", "paused"):
                if deadline is not None and time.monotonic() > deadline:
                    raise QueueError(f"the queue is still running after {timeout_s:g} s")
                for line in self._lines(0.5) if on_line is not None else _pause(0.5):
                    on_line(line)  # pyright: ignore[reportOptionalCall]
        finally:
            if on_line is not None:
                self._api.console_monitor.disable()
        ended = self.history()
        return ended[-1] if ended else {}

    def _lines(self, seconds: float) -> Iterator[str]:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                message = self._api.console_monitor.next_msg(timeout=left)
            except self._api.RequestTimeoutError:
                return
            yield from (line for line in message["msg"].splitlines() if line.strip())

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the API's errors into one line."""
        api = self._api
        try:
            yield
        except api.RequestTimeoutError:
            raise QueueError(f"the queue manager does not answer; see {self._log}") from None
        except (api.RequestFailedError, api.RequestParameterError) as error:
            raise QueueError(_first_line(error)) from None
        except api.WaitTimeoutError as error:
            raise QueueError(f"waited in vain: {_first_line(error)}; see {self._log}") from None


def _pause(seconds: float) -> Iterator[str]:
    time.sleep(seconds)
    return iter(())


def _first_line(error: object) -> str:
    """What an error says, without what its sender wrapped around it."""
    text = " ".join(str(error).split()).split(" Plan: {")[0]
    for wrapping in ("Request failed: ", "Failed to add an item: ", "Plan validation failed: "):
        text = text.removeprefix(wrapping)
    return text


def _last_error(log: str) -> str:
    """The last line of a log that names an error."""
    lines = Path(log).read_text(errors="replace").splitlines()
    named = [line.strip() for line in lines if "Error" in line]
    return named[-1] if named else f"see {log}"
