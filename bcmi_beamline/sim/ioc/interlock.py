"""The nanogoniometer's interlock: the modulator stays out of the crystal's reach."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial

import numpy as np
from caproto.server import PVGroup, pvproperty
from caproto.server.server import PvpropertyChar

from bcmi_beamline.config import NanogoniometerConfig
from bcmi_beamline.sim.ioc.motor import Motor

_ANGLES = 9
"""Tilts looked at along each tilt's way."""


def clearance(
    config: NanogoniometerConfig, z_um: float, mchi_deg: np.ndarray, mphi_deg: np.ndarray
) -> np.ndarray:
    """Distance from the crystal to the plane of the modulator, um; broadcasts over the tilts.

    A membrane point p stands at ``R (p + t - c) + c`` (see `NanogoniometerConfig`), so its plane has the
    normal ``n = R z`` and passes the crystal at ``t_z - c_z + n . c + n_z d0``, wherever x and y are.
    """
    mchi, mphi = np.deg2rad(mchi_deg), np.deg2rad(mphi_deg)
    normal = (np.sin(mphi) * np.cos(mchi), -np.sin(mchi), np.cos(mphi) * np.cos(mchi))
    pivot_x, pivot_y, pivot_z = config.pivot_um
    turned = normal[0] * pivot_x + normal[1] * pivot_y + normal[2] * pivot_z
    return z_um - pivot_z + turned + normal[2] * config.distance_at_z0_um


class Interlock(PVGroup):
    """Refuses moves of z, mchi and mphi that could bring the modulator inside ``stand_off_um``.

    All ways the three axes may take between where they stand and where they go are considered, since
    nothing orders axes that move at once: let a tilt finish before moving z in. z may always move out.

    Parameters
    ----------
    prefix : str
        Put before ``nano:interlock``.
    config : NanogoniometerConfig
        Pivot and stand-off as surveyed.
    motors : mapping
        The nanogoniometer's motors by axis name; their guards are set here.
    """

    message = pvproperty(
        value="", name="nano:interlock", dtype=PvpropertyChar, max_length=256, string_encoding="utf-8"
    )

    def __init__(self, prefix: str, config: NanogoniometerConfig, motors: Mapping[str, Motor]) -> None:
        super().__init__(prefix)
        self._config = config
        self._motors = motors
        self._said = ""
        for axis in ("z", "mchi", "mphi"):
            motors[axis].guard = partial(self._check, axis)

    def _check(self, axis: str, target: float) -> str | None:
        reason = self._danger(axis, target)
        if (reason or "") != self._said:
            self._said = reason or ""
            self._tell = asyncio.create_task(self.message.write(self._said, verify_value=False))
        return reason

    def _danger(self, axis: str, target: float) -> str | None:
        spans = {name: self._motors[name].span for name in ("z", "mchi", "mphi")}
        here = self._motors[axis].dial
        if axis == "z" and target >= here:
            return None
        spans[axis] = (min(here, target), max(here, target))
        nearest = clearance(
            self._config,
            spans["z"][0],
            np.linspace(*spans["mchi"], _ANGLES)[:, None],
            np.linspace(*spans["mphi"], _ANGLES),
        ).min()
        if nearest >= self._config.stand_off_um:
            return None
        return (
            f"{axis} to {target:.5g} could bring the modulator within {nearest:.0f} um of the crystal "
            f"(stand-off {self._config.stand_off_um:.0f} um): move z out first"
        )
