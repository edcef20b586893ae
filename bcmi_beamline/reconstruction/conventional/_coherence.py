"""Partial coherence: the pattern of a coherent wave, blurred by a small kernel that the data fix."""

from __future__ import annotations

import numpy as np
from scipy import fft as sp_fft

from bcmi_beamline.reconstruction.fourier import WORKERS


def gaussian_kernel(shape: tuple[int, ...], sigma: float = 0.5, radius: int = 4) -> np.ndarray:
    """A Gaussian of width `sigma` (pixels) that reaches `radius` pixels, or as many as fit into `shape`."""
    radii = [min(radius, (n - 1) // 2) for n in shape]
    grid = np.meshgrid(*(np.arange(-r, r + 1) for r in radii), indexing="ij")
    kernel = np.exp(-sum(x**2 for x in grid) / (2 * sigma**2))
    return (kernel / kernel.sum()).astype(np.float32)


class Coherence:
    """A kernel that blurs intensities: the transform of the mutual coherence function.

    Positive, of sum one. It also takes up whatever else blurs a pattern: a bandwidth, jitter of the angle.

    Parameters
    ----------
    shape : tuple of int
        (J, Ny, Nx) of the pattern.
    kernel : ndarray, three odd axes, float32, optional
        Centre in the middle; a narrow Gaussian by default.
    workers : int
        Threads.
    """

    def __init__(
        self, shape: tuple[int, ...], kernel: np.ndarray | None = None, workers: int = WORKERS
    ) -> None:
        self.kernel = gaussian_kernel(shape) if kernel is None else kernel
        self._shape = shape
        self._workers = workers
        self._transfer = self._of_kernel(shape)

    @property
    def widths(self) -> tuple[float, float, float]:
        """Root mean square widths of the kernel along (rocking, y, x), pixels."""
        found = []
        for axis, n in enumerate(self.kernel.shape):
            x = np.arange(n) - n // 2
            line = self.kernel.sum(axis=tuple(a for a in range(3) if a != axis), dtype=float)
            found.append(float(np.sqrt((line * x**2).sum() - (line * x).sum() ** 2)))
        return found[0], found[1], found[2]

    def blur(self, power: np.ndarray, back: bool = False) -> np.ndarray:
        """Intensities (J, Ny, Nx) convolved with the kernel, or correlated (`back`, the adjoint)."""
        spectrum = self._rfftn(power)
        spectrum *= self._transfer.conj() if back else self._transfer
        return self._irfftn(spectrum, power.shape)

    def refine(self, power: np.ndarray, packed: np.ndarray, steps: int) -> None:
        """Richardson-Lucy steps (W. H. Richardson, J. Opt. Soc. Am. 62, 55 (1972)) for the kernel.

        As J. N. Clark et al. (Nat. Commun. 3, 993 (2012)), but only over the central half of each axis,
        which holds nearly all counts. Unused pixels are taken as fitted.

        Parameters
        ----------
        power : ndarray, (J, Ny, Nx), float32
            Coherent intensities, corner origin.
        packed : ndarray, (J, Ny, Nx), float32
        steps : int
        """
        centre = np.ix_(*(np.r_[0 : n // 4, n - n // 4 : n] for n in power.shape))
        power, packed = power[centre], packed[centre]
        used = packed >= 0
        power = power * np.float32(packed[used].sum(dtype=float) / power[used].sum(dtype=float))
        light = self._rfftn(power)
        weight = self._lags(light.conj() * self._rfftn(used.astype(np.float32)), power.shape)
        for _ in range(steps):
            model = self._irfftn(light * self._of_kernel(power.shape), power.shape)
            quotient = np.where(used, packed / np.maximum(model, np.float32(1e-3)), 0).astype(np.float32)
            ratio = self._lags(light.conj() * self._rfftn(quotient), power.shape) / weight
            kernel = np.maximum(self.kernel * ratio, 0)
            self.kernel = kernel / kernel.sum(dtype=np.float32)
        self._transfer = self._of_kernel(self._shape)

    def _of_kernel(self, shape: tuple[int, ...]) -> np.ndarray:
        """Transfer function on the half spectrum of an array of `shape`."""
        whole = np.zeros(shape, np.float32)
        whole[self._places(shape)] = self.kernel
        return self._rfftn(whole)

    def _lags(self, spectrum: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The part of a correlation within the kernel's reach."""
        return self._irfftn(spectrum, shape)[self._places(shape)]

    def _places(self, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        radii = [n // 2 for n in self.kernel.shape]
        return np.ix_(*(np.arange(-r, r + 1) % n for r, n in zip(radii, shape, strict=True)))

    def _rfftn(self, a: np.ndarray) -> np.ndarray:
        return np.asarray(sp_fft.rfftn(a, workers=self._workers))

    def _irfftn(self, spectrum: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(sp_fft.irfftn(spectrum, shape, workers=self._workers, overwrite_x=True))
