"""From a converged pair of probe and object to a calibrated modulator: ambiguities, distance, quality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.optimize import minimize_scalar

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
    """Split complex values (n,) into two levels: 2-means, each level the middle of its densest half.

    The pixels of walls lie between the levels; they go to the nearer one but do not move it, since a level
    is the median over the half of its pixels that lie nearest to it.
    """
    centre = np.median(values.real) + 1j * np.median(values.imag)
    first = values[np.argmax(np.abs(values - centre) * (np.abs(values) < 2 * np.abs(values).mean()))]
    second = values[np.argmax(np.abs(values - first) * (np.abs(values) < 2 * np.abs(values).mean()))]
    levels = [complex(first), complex(second)]
    nearer = np.zeros(values.shape, bool)
    for _ in range(rounds):
        nearer = np.abs(values - levels[0]) <= np.abs(values - levels[1])
        groups = (values[nearer], values[~nearer])
        levels = [_middle(g, level) for g, level in zip(groups, levels, strict=True)]
    if abs(levels[1]) > abs(levels[0]):
        levels, nearer = levels[::-1], ~nearer
    within = np.abs(values - np.where(nearer, *levels)) ** 2
    explained = 1 - within.mean() / np.var(values)
    return Levels(levels[0], levels[1], float(explained), nearer)


def _middle(group: np.ndarray, level: complex) -> complex:
    if not group.size:
        return level
    middle = np.median(group.real) + 1j * np.median(group.imag)
    for _ in range(3):
        distance = np.abs(group - middle)
        core = group[distance <= np.median(distance)]
        middle = np.median(core.real) + 1j * np.median(core.imag)
    return complex(middle)


def flatten(image: np.ndarray, trusted: np.ndarray, rounds: int = 8) -> tuple[np.ndarray, np.ndarray, Levels]:
    """Phase ramp of a two-level object, so that its bare regions are flat.

    Returns
    -------
    ramp : ndarray, (2,)
        Turns of phase per pixel along (row, column), about index ``n // 2``; take them from the object and give
        them to the probe.
    flat : ndarray
        The object without the ramp, bare level 1.
    levels : Levels
        Of the trusted pixels of `flat`.
    """
    ramp = _ramp_of_peak(image, trusted)
    inside = ndimage.binary_erosion(trusted, iterations=2)
    inside = inside if inside.any() else trusted
    rows, columns = np.nonzero(inside)
    design = np.stack([np.ones(len(rows)), rows - image.shape[0] // 2, columns - image.shape[1] // 2], axis=1)
    flat = image * phase_ramp(image.shape, -ramp)
    levels = find_levels(flat[inside])
    for _ in range(rounds):
        bare = levels.is_bare
        phase = np.angle(flat[inside] / np.where(bare, levels.bare, levels.film))
        core = np.abs(phase) < 3 * np.median(np.abs(phase)) + 1e-6
        fit = np.linalg.lstsq(design[core], phase[core], rcond=None)[0] / (2 * np.pi)
        ramp = ramp + fit[1:]
        flat = image * phase_ramp(image.shape, -ramp)
        levels = find_levels(flat[inside])
        if np.abs(fit[1:] * image.shape).max() < 1e-5:
            break
    flat = (flat / levels.bare).astype(np.complex64)
    return ramp, flat, find_levels(flat[inside])


def phase_ramp(shape: tuple[int, ...], turns: np.ndarray) -> np.ndarray:
    """``exp(2 pi i (turns . index))``, index from ``n // 2``, complex64."""
    y, x = (np.exp(2j * np.pi * t * (np.arange(n) - n // 2)) for t, n in zip(turns, shape, strict=True))
    return (y[:, None] * x).astype(np.complex64)


def _ramp_of_peak(image: np.ndarray, trusted: np.ndarray) -> np.ndarray:
    """Strongest spatial frequency of the trusted region, turns per pixel, to a quarter of a period across."""
    size = [4 * n for n in image.shape]
    spectrum = np.abs(np.fft.fft2(np.where(trusted, image, 0), size))
    peak = np.unravel_index(spectrum.argmax(), spectrum.shape)
    return np.array([np.fft.fftfreq(n)[k] for k, n in zip(peak, size, strict=True)])


def focus(
    probe: np.ndarray, pixel: tuple[float, float], wavelength: float, nominal: float, power: float = 1.0
) -> float:
    """Distance in metres over which the back-propagated wave is most compact.

    Propagation keeps ``sum |w|**2``, so the smaller ``sum |w|**power`` for a power below 2, the fewer pixels
    share the energy: at the crystal, whose facets end sharply, nothing lies outside. Searched from 0.7 to 1.3
    of `nominal`, then by parabola.
    """
    spectrum = fft2(probe)

    def spread(distance: float) -> float:
        kernel = near_field_kernel(probe.shape[-2:], pixel, wavelength, -distance)  # pyright: ignore[reportArgumentType]
        modulus = np.abs(ifft2(spectrum * kernel, overwrite=True))
        return float((modulus**power).sum(dtype=float))

    step = 2 * max(pixel) ** 2 / wavelength
    span = np.arange(0.7 * nominal, 1.3 * nominal + step, step)
    best = span[np.argmin([spread(d) for d in span])]
    for half in (1.5 * step, 0.6 * step):
        tried = best + np.linspace(-half, half, 9)
        curve = np.polynomial.Polynomial.fit(tried - best, [spread(d) for d in tried], 3)
        found = minimize_scalar(curve, bounds=(-half, half), method="bounded")
        best = best + float(found.x)  # pyright: ignore[reportAttributeAccessIssue]
    return float(best)


def shift_wave(wave: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Move (..., Ny, Nx) by (row, column) pixels, sub-pixel, in Fourier space."""
    fy, fx = (np.fft.fftfreq(n) for n in wave.shape[-2:])
    ramp = np.exp(-2j * np.pi * (shift[0] * fy[:, None] + shift[1] * fx)).astype(np.complex64)
    return ifft2(fft2(wave) * ramp, overwrite=True)


def centre_of_mass(wave: np.ndarray, floor: float = 0.01) -> np.ndarray:
    """Centre of ``|wave|**2`` summed over modes, (row, column) from index ``n // 2``; pixels below `floor` of
    the peak do not count, so that a faint background far out does not pull."""
    power = (np.abs(wave) ** 2).reshape(-1, *wave.shape[-2:]).sum(axis=0)
    power = np.where(power > floor * power.max(), power, 0)
    return np.array(ndimage.center_of_mass(power)) - [n // 2 for n in power.shape]
