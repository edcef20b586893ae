"""What the probe may be: any wave, or only those that come from a small crystal some way before the object.

A Bragg beam that has spread over micrometres left a crystal of a fraction of one. That it did so is worth
hundreds of frames: of all waves on the object's pixels few are small one propagation before. Either kind
keeps the probe in coordinates of its own, `inner`, in which a step is taken and a shift costs little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
LOST = 1e-4
"""Share of the light along either axis that falls outside the part of the window that is computed."""

Waves = Callable[[Array], Array]


class Free:
    """Any wave on the window, kept as its spectrum.

    Parameters
    ----------
    shape : (ny, nx)
    device : Device
    taper : ndarray, (ny, nx), optional
        What the wave is multiplied with after every step. Light moved by one far field of a pixel, with the
        object that it meets, is almost the same light: a wider field needs to be told that the beam stands
        in its middle.
    """

    def __init__(self, shape: tuple[int, int], device: Device, taper: np.ndarray | None = None) -> None:
        self._device, self._frequencies = device, [np.fft.fftfreq(n) for n in shape]
        self._taper = None if taper is None else device.put(taper)
        self.box = slice(0, shape[0]), slice(0, shape[1])

    def hold(self, waves: Array) -> Array:
        """Inner coordinates of waves (..., ny, nx)."""
        return self._device.fft2(waves)

    def waves(self, inner: Array) -> Array:
        """Waves (..., ny, nx) of inner coordinates."""
        return self._device.ifft2(inner)

    def at(self, shift: Sequence[float] | np.ndarray) -> tuple[Waves, Waves]:
        """What shifts by (row, column) pixels: inner coordinates to waves in the box, and its adjoint."""
        y, x = (
            np.exp(-2j * np.pi * s * f).astype(np.complex64)
            for s, f in zip(shift, self._frequencies, strict=True)
        )
        ramp, back = self._device.put(y[:, None] * x), self._device.put((y[:, None] * x).conj())
        return (
            lambda inner: self._device.ifft2(inner * ramp),
            lambda waves: self._device.fft2(waves) * back,
        )

    def tidy(self, inner: Array) -> Array:
        """Inner coordinates after a step."""
        if self._taper is None:
            return inner
        return self.hold(self.waves(inner) * self._taper)


class Source:
    """Waves that come from a region of a plane in front of the object, kept as they are there.

    Propagation is a matrix for either axis, since its kernel is a product, and only the columns of the region
    are kept: two small products instead of four transforms. Where hardly any light falls on the object
    nothing need be computed: `box` are the rows and columns that have light.

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
        self.box = slice(0, ny), slice(0, nx)
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
        self._sides = rows, columns
        self._spectra = [np.fft.fft(side, axis=0) for side in self._sides]
        self._mask = self._device.put(mask)
        self._there, self._back = self._products(self._sides)

    def _products(self, sides: Sequence[np.ndarray]) -> tuple[Waves, Waves]:
        rows, columns = (side.astype(np.complex64) for side in sides)
        put = self._device.put
        left, right = put(rows), put(np.ascontiguousarray(columns.T))
        back_left, back_right = put(np.ascontiguousarray(rows.conj().T)), put(columns.conj())
        return (
            lambda inner: left @ inner @ right,
            lambda waves: (back_left @ waves @ back_right) * self._mask,
        )

    def hold(self, waves: Array) -> Array:
        """What of waves (..., ny, nx) on the object comes from the region, there."""
        return self._back(waves)

    def waves(self, inner: Array) -> Array:
        """Waves (..., ny, nx) on the object that leave the region."""
        return self._there(inner)

    def project(self, waves: Array) -> Array:
        """The part of waves (..., ny, nx) on the object that comes from the region."""
        return self.waves(self.hold(waves))

    def at(self, shift: Sequence[float] | np.ndarray) -> tuple[Waves, Waves]:
        """What shifts by (row, column) pixels: waves in the region to those in the box, and its adjoint."""
        moved = []
        for s, spectrum, box in zip(shift, self._spectra, self.box, strict=True):
            ramp = np.exp(-2j * np.pi * s * np.fft.fftfreq(len(spectrum)))[:, None]
            moved.append(np.fft.ifft(spectrum * ramp, axis=0)[box])
        return self._products(moved)

    def tidy(self, inner: Array) -> Array:
        """Inner coordinates after a step."""
        return inner

    def shrink(self, waves: Array) -> None:
        """Make the region where waves (m, ny, nx) on the object, added up, left the source, and some room."""
        left = self._device.get(self.hold(waves))
        widths = [SMOOTH / size for size in self._pixel]
        power = ndimage.gaussian_filter((np.abs(left) ** 2).sum(axis=0), widths)
        floor = max(EDGE**2 * power.max(), NOISE * np.median(power))
        if not power.max() > floor:
            return  # it fills the plane: no crystal to be seen
        bright = np.asarray(ndimage.binary_fill_holes(power > floor))
        away = np.asarray(ndimage.distance_transform_edt(~bright, sampling=self._pixel))
        mask = away <= max(ROOM, *self._pixel)
        y, x = (slice(*np.nonzero(mask.any(axis=axis))[0][[0, -1]] + (0, 1)) for axis in (1, 0))
        self._keep(self._sides[0][:, y], self._sides[1][:, x], mask[y, x].astype(np.float32))
        light = (np.abs(self._device.get(self.project(waves))) ** 2).sum(axis=0, dtype=float)
        self.box = _lit(light.sum(axis=1)), _lit(light.sum(axis=0))


def _lit(profile: np.ndarray) -> slice:
    """Where a profile (n,) has all but `LOST` of its sum, half of that on either side."""
    total = np.cumsum(profile) / profile.sum()
    low, high = np.searchsorted(total, [LOST / 2, 1 - LOST / 2])
    return slice(int(low), min(int(high) + 1, len(profile)))
