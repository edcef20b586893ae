"""Near-field propagation between parallel planes.

The kernel is ``exp(-i pi lambda d f**2)`` (Goodman, *Introduction to Fourier Optics*, section 4.2: the
Fresnel transfer function without the constant ``exp(i k d)``), for a wave ``exp(+i k z - i omega t)`` and a
numpy forward transform. It is exact for a wave that stays inside the array; `near_field_limit` says how
far the kernel itself is sampled well enough.
"""

from __future__ import annotations

import numpy as np

from bcmi_beamline.reconstruction.fourier import fft2, ifft2


def near_field_kernel(
    shape: tuple[int, int], pixel_size: tuple[float, float], wavelength: float, distance: float
) -> np.ndarray:
    """Transfer function over `distance`, zero frequency at the corner.

    Parameters
    ----------
    shape : (Ny, Nx)
    pixel_size : (y, x), m
    wavelength, distance : float, m
        A negative distance propagates back.

    Returns
    -------
    ndarray, (Ny, Nx), complex64
        Its modulus is 1, so that propagation keeps the energy and its inverse is its conjugate.
    """
    fy, fx = (np.fft.fftfreq(n, p) for n, p in zip(shape, pixel_size, strict=True))
    phase = np.pi * wavelength * distance
    return (np.exp(-1j * phase * fy**2)[:, None] * np.exp(-1j * phase * fx**2)).astype(np.complex64)


def propagate(
    wave: np.ndarray, pixel_size: tuple[float, float], wavelength: float, distance: float
) -> np.ndarray:
    """Carry `wave` (..., Ny, Nx) over `distance` metres; complex64, same shape and pixel."""
    kernel = near_field_kernel(wave.shape[-2:], pixel_size, wavelength, distance)  # pyright: ignore[reportArgumentType]
    return ifft2(fft2(wave.astype(np.complex64, copy=False)) * kernel, overwrite=True)


def near_field_limit(shape: tuple[int, int], pixel_size: tuple[float, float], wavelength: float) -> float:
    """Distance in metres beyond which the kernel is undersampled, ``n pixel**2 / lambda``.

    Farther than this, a wave that uses its whole bandwidth spreads past the edges of the array and comes
    back in on the other side.
    """
    return min(n * p**2 for n, p in zip(shape, pixel_size, strict=True)) / wavelength
