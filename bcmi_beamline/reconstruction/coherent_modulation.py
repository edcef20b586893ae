"""Coherent modulation imaging in two dimensions: one frame and a known modulator give the wave at the object.

A wave leaves a small object, travels a distance d, meets the modulator and goes on to the far field:
``psi = FFT2(M P_d(w))`` (F. Zhang et al., Nat. Commun. 7, 13367 (2016)). The modulator makes the phase
problem of a single frame overdetermined and of one answer, up to a constant phase; a start from noise is
enough, though not each finds it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from bcmi_beamline.reconstruction.fourier import fft2, ifft2, to_centre, to_corner
from bcmi_beamline.reconstruction.propagation import near_field_kernel

ANSCOMBE = 0.375
SHRINK_EVERY, SHRINK_SIGMA, SHRINK_LEVEL = 40, 2.0, 0.3
"""The support is drawn anew after so many iterations: where the smoothed modulus exceeds a share of its
99.5th percentile (S. Marchesini et al., Phys. Rev. B 68, 140101 (2003))."""
FINISH, WIDER = 0.75, 2
"""From this share of the iterations the support stands still, wider by so many pixels than it was drawn."""


class ModulationOperator:
    """``w -> FFT2(M P_d(w))`` and its adjoint, arrays (N, N) with the origin at the corner.

    Parameters
    ----------
    transmission : ndarray, (Ny, Nx), complex
        The modulator where the beam passes it, the beam axis at ``n // 2``.
    pixel_size : (y, x), m
        Of the modulator and of the object.
    wavelength, distance : float, m
        Object to modulator.
    """

    def __init__(
        self, transmission: np.ndarray, pixel_size: tuple[float, float], wavelength: float, distance: float
    ) -> None:
        self.shape = transmission.shape
        self._modulator = to_corner(transmission).astype(np.complex64)
        shape = transmission.shape[0], transmission.shape[1]
        self._kernel = near_field_kernel(shape, pixel_size, wavelength, distance)

    def forward(self, wave: np.ndarray) -> np.ndarray:
        """Carry the wave at the object to the detector."""
        there = ifft2(fft2(wave) * self._kernel, overwrite=True)
        return fft2(there * self._modulator, overwrite=True)

    def adjoint(self, wave: np.ndarray) -> np.ndarray:
        """Carry a wave on the detector back to the object, conjugating every factor."""
        there = ifft2(wave) * self._modulator.conj()
        return ifft2(fft2(there, overwrite=True) * self._kernel.conj(), overwrite=True)


@dataclass
class ObjectWave:
    """What one frame tells of the wave at the object.

    Parameters
    ----------
    wave : ndarray, (Ny, Nx), complex64
        Origin at ``n // 2``; ``|FFT2(M P_d(wave))|**2`` are the counts, unitary.
    support : ndarray, (Ny, Nx), bool
    r2 : ndarray, (iterations,)
        ``sum (|F| - sqrt(I))**2 / sum I`` over the good pixels, of the best try.
    tried : ndarray, (tries,)
        Last r2 of every start, best first: how often the same answer was found.
    """

    wave: np.ndarray
    support: np.ndarray
    r2: np.ndarray
    tried: np.ndarray


def image_wave(
    frame: np.ndarray,
    operator: ModulationOperator,
    *,
    mask: np.ndarray | None = None,
    support: np.ndarray | None = None,
    start: np.ndarray | None = None,
    iterations: int = 300,
    tries: int = 8,
    shrink: bool = True,
    seed: int = 0,
) -> ObjectWave:
    """Find the wave at the object from one frame.

    Steps down the gradient of Anscombe's least squares, accelerated, with a restart where the fit gets
    worse (O'Donoghue and Candes, Found. Comput. Math. 15, 715 (2015)), inside a support that may shrink.

    Parameters
    ----------
    frame : ndarray, (Ny, Nx)
        Counts, zero frequency at ``n // 2``.
    operator : ModulationOperator
    mask : ndarray, (Ny, Nx), bool, optional
        True where a pixel must not be used.
    support : ndarray, (Ny, Nx), bool, optional
        Where the object may be, origin at ``n // 2``; the central quarter of the field by default.
    start : ndarray, (Ny, Nx), complex, optional
        Wave to start from, for instance the calibration's probe carried back; random otherwise.
    iterations, tries : int
        Of each start, and how many random starts; one where `start` is given.
    shrink : bool
        Let the support follow the wave.
    seed : int

    Returns
    -------
    ObjectWave

    Raises
    ------
    ValueError
        When shapes do not fit, the frame holds no counts, or a number is out of range.
    """
    good = np.ones(frame.shape, bool) if mask is None else ~mask
    box = _central_quarter(operator.shape) if support is None else support
    for name, array in (("frame", frame), ("mask", good), ("support", box), ("start", start)):
        if array is not None and array.shape != operator.shape:
            raise ValueError(f"{name} {array.shape} does not fit the modulator's {operator.shape}")
    counts = np.where(good, frame, 0).astype(np.float32)
    if not (np.isfinite(counts).all() and counts.sum() > 0):
        raise ValueError("the frame must hold finite counts outside the mask, and some")
    if iterations < 1 or tries < 1:
        raise ValueError(f"iterations ({iterations}) and tries ({tries}) must be 1 or more")
    rng = np.random.default_rng(seed)
    data = to_corner(counts), to_corner(good)
    found = []
    for _ in range(1 if start is not None else tries):
        if start is None:
            wave = rng.standard_normal(box.shape) + 1j * rng.standard_normal(box.shape)
        else:
            wave = start
        wave = to_corner(np.where(box, wave, 0)).astype(np.complex64)
        wave *= np.sqrt(counts.sum() / np.vdot(wave, wave).real)
        found.append(_descend(operator, data, wave, to_corner(box), iterations, shrink))
    found.sort(key=lambda f: f[2][-1])
    wave, inside, r2 = found[0]
    return ObjectWave(to_centre(wave), to_centre(inside), np.array(r2), np.array([f[2][-1] for f in found]))


def _descend(
    operator: ModulationOperator,
    data: tuple[np.ndarray, np.ndarray],
    wave: np.ndarray,
    support: np.ndarray,
    iterations: int,
    shrink: bool,
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    counts, good = data
    target, total = np.sqrt(counts + np.float32(ANSCOMBE)), counts.sum(dtype=float)
    box, ahead, age, r2 = support, wave, 0, []
    for i in range(iterations):
        psi = operator.forward(ahead)
        power = np.abs(psi) ** 2
        r2.append(float(((np.sqrt(power) - np.sqrt(counts)) ** 2)[good].sum(dtype=float) / total))
        factor = np.where(good, target / np.sqrt(power + np.float32(ANSCOMBE)) - 1, 0)
        stepped = np.where(support, ahead + operator.adjoint(factor * psi), 0).astype(np.complex64)
        age = 0 if i and r2[-1] > r2[-2] else age + 1
        ahead = stepped + np.float32(min((age - 1) / (age + 2), 0.98) if age else 0) * (stepped - wave)
        wave = stepped
        if shrink and i + 1 == round(FINISH * iterations):
            support = box & to_corner(ndimage.binary_dilation(to_centre(support), iterations=WIDER))
        elif shrink and (i + 1) % SHRINK_EVERY == 0 and i + 1 < FINISH * iterations:
            smooth = ndimage.gaussian_filter(np.abs(wave), SHRINK_SIGMA, mode="wrap")
            support = support & (smooth > SHRINK_LEVEL * np.percentile(smooth[support], 99.5))
    return wave, support, r2


def _central_quarter(shape: tuple[int, ...]) -> np.ndarray:
    box = np.zeros(shape, bool)
    box[tuple(slice(n // 2 - n // 8, n // 2 + n // 8) for n in shape)] = True
    return box
