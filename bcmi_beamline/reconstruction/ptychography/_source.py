"""Where the beam comes from: a small crystal, some way before the scanned object.

A Bragg beam that has spread over micrometres left a crystal of a fraction of one. That it did so is worth
hundreds of frames: of all waves on the object's pixels few are small one propagation before.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from bcmi_beamline.reconstruction.ptychography._devices import Array, Device

SMOOTH, EDGE = 30e-9, 0.05
"""The crystal is where the wave, smoothed (standard deviation, m), is above this share of its maximum."""
NOISE = 5.0
"""Times the median of the power: what is there all over the plane is no crystal."""
ROOM = 80e-9
"""Kept around it, m: a distance that is wrong by 10 um blurs edges by 30 nm."""
REACH = 0.5
"""Share of the far field of one pixel within which the crystal is sought."""


class Source:
    """Waves that come from a region of a plane in front of the object, and the projection on them.

    Propagation is a matrix for either axis, since its kernel is a product, and only the columns of the region
    are kept: two small products instead of four transforms.

    Parameters
    ----------
    tilt : ndarray, (ny, nx), complex64
        A product t(y) u(x) of modulus 1 that waves on the object carry beside what they left the source with.
    finer : int
        How many far fields of a pixel the arrays span.
    pixel : (y, x), m
    wavelength, distance : float, m
    device : Device
    """

    def __init__(
        self,
        tilt: np.ndarray,
        finer: int,
        pixel: tuple[float, float],
        wavelength: float,
        distance: float,
        device: Device,
    ) -> None:
        self._device, self._pixel = device, pixel
        ny, nx = tilt.shape
        ramps = tilt[:, nx // 2] / tilt[ny // 2, nx // 2], tilt[ny // 2]
        sides = []
        for ramp, size in zip(ramps, pixel, strict=True):
            n = len(ramp)
            half = int(REACH * n / finer / 2)
            place = np.eye(n, 2 * half, half - n // 2)
            frequency = np.fft.fftfreq(n, size)[:, None]
            kernel = np.exp(-1j * np.pi * wavelength * distance * frequency**2)
            sides.append(ramp[:, None] * np.fft.ifft(kernel * np.fft.fft(place, axis=0), axis=0))
        self._keep(sides[0], sides[1], np.ones((sides[0].shape[1], sides[1].shape[1]), np.float32))

    def _keep(self, rows: np.ndarray, columns: np.ndarray, mask: np.ndarray) -> None:
        put = self._device.put
        self._rows, self._columns = rows.astype(np.complex64), columns.astype(np.complex64)
        self._mask = put(mask)
        self._there = put(self._rows), put(np.ascontiguousarray(self._columns.T))
        self._back = put(np.ascontiguousarray(self._rows.conj().T)), put(self._columns.conj())

    def project(self, waves: Array) -> Array:
        """The part of waves (..., ny, nx) on the object that comes from the region; arrays of the device."""
        left = (self._back[0] @ waves @ self._back[1]) * self._mask
        return self._there[0] @ left @ self._there[1]

    def shrink(self, waves: Array) -> None:
        """Make the region where waves (m, ny, nx) on the object, added up, left the source, and some room."""
        left = self._device.get(self._back[0] @ waves @ self._back[1])
        widths = [SMOOTH / size for size in self._pixel]
        power = ndimage.gaussian_filter((np.abs(left) ** 2).sum(axis=0), widths)
        floor = max(EDGE**2 * power.max(), NOISE * np.median(power))
        if not power.max() > floor:
            return  # it fills the plane: no crystal to be seen
        bright = np.asarray(ndimage.binary_fill_holes(power > floor))
        away = np.asarray(ndimage.distance_transform_edt(~bright, sampling=self._pixel))
        mask = away <= max(ROOM, *self._pixel)
        y, x = (slice(*np.nonzero(mask.any(axis=axis))[0][[0, -1]] + (0, 1)) for axis in (1, 0))
        self._keep(self._rows[:, y], self._columns[:, x], mask[y, x].astype(np.float32))
