"""What every point of a scan does, in as few messages as it takes.

bluesky's own stubs format the call stack each time (0.15-1 ms), eight times a point; these yield the same
messages directly.
"""

from typing import Any

from bluesky.utils import Msg, MsgGenerator

from bcmi_beamline.devices import Devices

BEAM_POLL_S = 0.5
"""How soon a frame without beam is tried again."""


def move(*motors_and_targets: Any) -> MsgGenerator[None]:
    """``motor, target, motor, target ...`` at once, and wait for all; the point may be repeated from here."""
    yield Msg("checkpoint")
    for motor, target in zip(motors_and_targets[::2], motors_and_targets[1::2], strict=True):
        yield Msg("set", motor, target, group="move")
    yield Msg("wait", None, group="move", timeout=None)


def take_sentinel(devices: Devices, *readables: Any) -> MsgGenerator[dict[str, float]]:
    """Expose one frame whose event carries ``sentinel`` 1: data reduction keeps it apart from the scan."""
    yield Msg("set", devices.sentinel, 1, group="sentinel")
    yield Msg("wait", None, group="sentinel", timeout=None)
    point = yield from take_point(devices, *readables, devices.sentinel)
    yield Msg("set", devices.sentinel, 0, group="sentinel")
    yield Msg("wait", None, group="sentinel", timeout=None)
    return point


def take_point(devices: Devices, *readables: Any) -> MsgGenerator[dict[str, float]]:
    """Expose one frame and put it with the monitor and `readables` into one event.

    A frame after which the monitor says that there is no beam (``suspend.monitor_flux``) is no event: it is
    exposed again until there is one. The suspenders of the session notice a lost beam a moment too late.

    Returns
    -------
    dict
        Every value of the event by data key.
    """
    suspend = devices.beamline.suspend
    floor = (suspend.monitor_flux if suspend else None) or 0.0
    while True:
        yield Msg("trigger", devices.eiger, group="expose")
        yield Msg("wait", None, group="expose", timeout=None)
        yield Msg("create", None, name="primary")
        values: dict[str, float] = {}
        for device in (devices.eiger, *readables, devices.monitor):
            reading = yield Msg("read", device)
            values.update({key: item["value"] for key, item in (reading or {}).items()})
        if values.get("monitor_flux", floor) >= floor:
            yield Msg("save")
            return values
        yield Msg("drop")
        yield Msg("sleep", None, BEAM_POLL_S)


def take_series(devices: Devices, meanwhile: MsgGenerator[Any] | None = None) -> MsgGenerator[int]:
    """Fly: the frames of one arming in mode "burst" or "external", told as they come to the stream "primary".

    Parameters
    ----------
    devices : Devices
        Detector prepared and staged, a run open.
    meanwhile : generator, optional
        What moves while the frames are taken.

    Returns
    -------
    int
        Frames told.
    """
    eiger = devices.eiger
    yield Msg("declare_stream", None, eiger, name="primary", collect=True)
    yield Msg("kickoff", eiger, group="kickoff")
    yield Msg("wait", None, group="kickoff", timeout=None)
    if meanwhile is not None:
        yield from meanwhile
    done = yield Msg("complete", eiger, group="flight")
    while done is not None and not done.done:
        yield Msg("collect", eiger, name="primary", return_payload=False)
        yield Msg("sleep", None, 0.1)
    yield Msg("wait", None, group="flight", timeout=None)
    while eiger.untold:
        yield Msg("collect", eiger, name="primary", return_payload=False)
    return eiger.get_index()
