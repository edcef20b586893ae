"""From a converged pair of probe and object to a calibrated modulator: ambiguities, distance, quality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.polynomial import Polynomial
from scipy import ndimage

from bcmi_beamline.reconstruction.fourier import fft2, ifft2
from bcmi_beamline.reconstruction.propagation import near_field_kernel


@dataclass
class Levels:
    """The two levels of a modulator.

    Parameters
    ----------
    bare, film : complex
        Values of the brighter and the darker level.
    two_valuedness : float
        Share of the variance that two levels explain, 0 to 1.
    is_bare : ndarray, bool
        Pixels nearer to the bare level.
    """

    bare: complex
    film: complex
    two_valuedness: float
    is_bare: np.ndarray

    @property
    def phase_step(self) -> float:
        """Retardation of the film against the bare membrane, rad, 0 to 2 pi."""
        return float(-np.angle(self.film / self.bare) % (2 * np.pi))

    @property
    def modulus(self) -> float:
        """Amplitude transmission of the film against the bare membrane."""
        return abs(self.film / self.bare)


def find_levels(values: np.ndarray, rounds: int = 20) -> Levels:
    """Split complex values (n,) into two levels: 2-means with robust middles.

    The pixels of walls lie between the levels; they go to the nearer one but hardly move it, since a level is
    the median over the half of its pixels that lie nearest to it. The first split is along the direction in
    which the values spread most.
    """
    centred = values - values.mean()
    if np.abs(centred).max() <= 1e-6 * np.abs(values).max():
        level = complex(values.mean())
        return Levels(level, level, 0.0, np.ones(values.shape, bool))
    axis = np.exp(0.5j * np.angle((centred**2).sum()))
    nearer = np.real(centred * axis.conj()) > 0
    levels = [complex(values[nearer].mean()), complex(values[~nearer].mean())]
    for _ in range(rounds):
        levels = [_middle(values[nearer], levels[0]), _middle(values[~nearer], levels[1])]
        split = np.abs(values - levels[0]) <= np.abs(values - levels[1])
        if (split == nearer).all():
            break
        nearer = split
    if abs(levels[1]) > abs(levels[0]):
        levels, nearer = levels[::-1], ~nearer
    within = np.abs(values - np.where(nearer, *levels)) ** 2
    return Levels(levels[0], levels[1], float(1 - within.mean() / np.var(values)), nearer)


def _middle(group: np.ndarray, start: complex) -> complex:
    if not group.size:
        return start
    core = group
    for _ in range(3):
        middle = _median(core)
        distance = np.abs(group - middle)
        core = group[distance <= np.median(distance)]
    return _median(core)


def _median(values: np.ndarray) -> complex:
    return complex(np.median(np.real(values)), np.median(np.imag(values)))


def flatten(image: np.ndarray, trusted: np.ndarray, rounds: int = 12) -> tuple[np.ndarray, complex, Levels]:
    """Phase ramp and scale of a two-level object that make its bare regions flat and 1.

    Divide the object by ``scale * phase_ramp(shape, ramp)`` and multiply the probe by it.

    Returns
    -------
    ramp : ndarray, (2,)
        Turns of phase per pixel along (row, column), about index ``n // 2``.
    scale : complex
    levels : Levels
        Of the trusted pixels after that.
    """
    values = image[trusted]
    rows, columns = np.nonzero(trusted) - np.array([[n // 2] for n in image.shape])
    design = np.stack([np.ones(len(rows)), rows, columns], axis=1)
    ramp = _strongest_frequency(image, trusted)
    for _ in range(rounds):
        flat = values * np.exp(-2j * np.pi * (design[:, 1:] @ ramp))
        levels = find_levels(flat)
        phase = np.angle(flat / np.where(levels.is_bare, levels.bare, levels.film))
        core = np.abs(phase) <= 2 * np.median(np.abs(phase))
        change = np.linalg.lstsq(design[core], phase[core], rcond=None)[0][1:] / (2 * np.pi)
        ramp = ramp + change
        if (np.abs(change) * image.shape < 1e-5).all():
            break
    flat = values * np.exp(-2j * np.pi * (design[:, 1:] @ ramp))
    scale = find_levels(flat).bare
    return ramp, scale, find_levels(flat / scale)


def phase_ramp(shape: tuple[int, ...], turns: np.ndarray) -> np.ndarray:
    """``exp(2 pi i (turns . index))``, index from ``n // 2``, complex64."""
    y, x = (np.exp(2j * np.pi * t * (np.arange(n) - n // 2)) for t, n in zip(turns, shape, strict=True))
    return (y[:, None] * x).astype(np.complex64)


def _strongest_frequency(image: np.ndarray, trusted: np.ndarray) -> np.ndarray:
    """Strongest spatial frequency of the trusted region, turns per pixel, to a quarter of a period across."""
    size = [4 * n for n in image.shape]
    spectrum = np.abs(np.fft.fft2(np.where(trusted, image, 0), size))
    peak = np.unravel_index(spectrum.argmax(), spectrum.shape)
    return np.array([np.fft.fftfreq(n)[k] for k, n in zip(peak, size, strict=True)])


def focus(
    probe: np.ndarray,
    pixel: tuple[float, float],
    wavelength: float,
    near: float,
    floor: float = 0.01,
    finer: int = 1,
    wide: bool = True,
) -> float:
    """Distance in metres over which the back-propagated wave (Ny, Nx) covers the smallest area.

    A crystal ends at its facets, so that at its plane the least wave lies outside them. The area is the mean
    of ``|w|**2 / (|w|**2 + t)`` with ``t`` the square of `floor` of the largest modulus: every pixel inside
    counts as one whatever its brightness, so that strain, which makes the wave brightest and most compact in
    another plane, hardly matters. A Hann window over the band takes away the fringes of the band's sharp
    edge, which are brighter than `floor` some pixels outside the facets. The area is taken over the central
    quarter of the far field of one pixel, beyond which noise would rule. Searched from 0.75 to 1.25 of
    `near`, unless it is known to be within three depths of focus (`wide` false), then refined by a cubic
    through one depth of focus to either side.

    `finer` is how many such far fields the probe spans.
    """
    y, x = (np.cos(np.pi * np.fft.fftfreq(n)).astype(np.float32) ** 2 for n in probe.shape)
    there = near_field_kernel((len(y), len(x)), pixel, wavelength, -near)
    wave = ifft2(fft2(probe) * (y[:, None] * x) * there, overwrite=True)
    # near its crystal the wave is small: what lies beyond half of the far field of a pixel need not be moved
    wave = _middle_of(wave, [n // (2 * finer) for n in wave.shape])
    shape, spectrum = (wave.shape[0], wave.shape[1]), fft2(wave)
    quarter = [n // 2 for n in shape]

    def area(distance: float) -> float:
        kernel = near_field_kernel(shape, pixel, wavelength, near - distance)
        power = np.abs(_middle_of(ifft2(spectrum * kernel, overwrite=True), quarter)) ** 2
        return float((power / (power + floor**2 * np.percentile(power, 99.5))).mean(dtype=float))

    depth = max(pixel) ** 2 / wavelength
    best = near
    for reach in ([0.25 * near] if wide else []) + [3 * depth, depth]:
        tried = best + np.linspace(-reach, reach, max(15, round(reach / depth) | 1))
        values = np.array([area(d) for d in tried])
        best = tried[values.argmin()]
    curve = Polynomial.fit(tried, values, 3)
    turns = curve.deriv().roots()
    turns = turns[np.isreal(turns) & (curve.deriv(2)(turns).real > 0)].real
    turns = turns[np.abs(turns - best) < depth]
    return float(turns[0] if len(turns) else best)


def _middle_of(wave: np.ndarray, shape: list[int]) -> np.ndarray:
    """The pixels about index ``n // 2``."""
    return wave[
        tuple(slice(n // 2 - m // 2, n // 2 - m // 2 + m) for n, m in zip(wave.shape, shape, strict=True))
    ]


def shift_wave(wave: np.ndarray, shift: tuple[float, float]) -> np.ndarray:
    """Move (..., Ny, Nx) by (row, column) pixels, sub-pixel, in Fourier space."""
    fy, fx = (np.fft.fftfreq(n) for n in wave.shape[-2:])
    ramp = np.exp(-2j * np.pi * (shift[0] * fy[:, None] + shift[1] * fx)).astype(np.complex64)
    return ifft2(fft2(wave) * ramp, overwrite=True)


def centre_of_mass(wave: np.ndarray, floor: float = 0.01) -> np.ndarray:
    """Centre of ``|wave|**2`` summed over modes, (row, column) from index ``n // 2``.

    Pixels below `floor` of the peak do not count, so that a faint background far out does not pull.
    """
    power = (np.abs(wave) ** 2).reshape(-1, *wave.shape[-2:]).sum(axis=0)
    power = np.where(power > floor * power.max(), power, 0)
    return np.array(ndimage.center_of_mass(power)) - [n // 2 for n in power.shape]
