"""Remove what diffraction leaves open: shift, phase, ramp, twin; and bring objects onto one grid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.fft import next_fast_len

from bcmi_beamline.reconstruction.fourier import fftn, ifftn
from bcmi_beamline.scans import Reconstruction


def twin(image: np.ndarray) -> np.ndarray:
    """The conjugate reversed through the origin at ``n // 2``, ``image(-r)*``: same diffraction pattern."""
    axes = tuple(range(image.ndim))
    reversed_ = np.flip(image, axes)
    even = tuple(1 - n % 2 for n in image.shape)  # an even axis has its origin right of the middle
    return np.conj(np.roll(reversed_, even, axes))


def register(reference: np.ndarray, image: np.ndarray, *, precision: float = 0.01) -> np.ndarray:
    """Sub-voxel shift of `image` from `reference`, found from their complex cross-correlation.

    ``shift(image, -register(reference, image))`` lies on `reference`. Arrays are taken as periodic.
    Upsampled by matrix DFT (M. Guizar-Sicairos et al., Opt. Lett. 33, 156 (2008)).

    Parameters
    ----------
    reference, image : ndarray, same shape
        Real or complex, any number of axes.
    precision : float
        Of the answer, voxels.

    Returns
    -------
    shift : ndarray, (ndim,)
        Voxels.
    """
    cross = np.conj(_fftn(reference)) * _fftn(image)
    return _peak(cross, precision)


def register_ramp(reference: np.ndarray, image: np.ndarray, *, precision: float = 0.01) -> np.ndarray:
    """Linear phase of `image` against `reference`, in cycles per array length along each axis, (ndim,).

    The counterpart of `register` with the two spaces exchanged.
    """
    product = np.conj(reference) * image
    return _peak(np.fft.ifftshift(product), precision)


def shift(image: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Move a periodic image by a sub-voxel amount (Fourier shift theorem), complex64."""
    spectrum = _fftn(image)
    for axis, (n, s) in enumerate(zip(image.shape, by, strict=True)):
        spectrum *= _on_axis(np.exp(-2j * np.pi * np.fft.fftfreq(n) * s), axis, image.ndim)
    return ifftn(spectrum, overwrite=True)


def add_ramp(image: np.ndarray, cycles: np.ndarray) -> np.ndarray:
    """Multiply by ``exp(2 pi i cycles . n / N)``, `n` counted from ``n // 2``; complex64."""
    out = image.astype(np.complex64)
    for axis, (n, c) in enumerate(zip(image.shape, cycles, strict=True)):
        ramp = np.exp(2j * np.pi * c * (np.arange(n) - n // 2) / n)
        out *= _on_axis(ramp, axis, image.ndim)
    return out


def correlation(a: np.ndarray, b: np.ndarray) -> complex:
    """Normalised complex correlation ``<a, b> / (|a| |b|)``: modulus 1 where equal but for a factor."""
    norm = float(np.linalg.norm(a.ravel()) * np.linalg.norm(b.ravel()))
    return complex(np.vdot(a, b)) / norm if norm > 0 else 0j


def align(
    image: np.ndarray, reference: np.ndarray, *, ramp: bool = True, free_axes: tuple[int, ...] | None = None
) -> np.ndarray:
    """Shift, and phase, and where asked de-ramp `image` onto `reference`.

    The moduli are registered first, because a ramp pulls the complex correlation apart; then ramp and shift
    are found in turn.

    Parameters
    ----------
    image, reference : ndarray, same shape, complex
    ramp : bool
        Whether a linear phase counts as trivial. It does when the Bragg peak or the centre of a pixel is
        known less well than the data are: a peak off by one pixel gives one cycle across the field of view.
    free_axes : tuple of int, optional
        Axes along which the image may be shifted; all by default.

    Returns
    -------
    aligned : ndarray, complex64
        Scale is left alone; ``correlation(reference, aligned)`` is real and positive.
    """
    allowed = np.ones(image.ndim, bool)
    if free_axes is not None:
        allowed[:] = [axis in free_axes for axis in range(image.ndim)]
    moved = shift(image, -register(np.abs(reference), np.abs(image)) * allowed)
    best = moved
    for _ in range(3):
        if ramp:
            moved = add_ramp(moved, register_ramp(reference, moved))
        moved = shift(moved, -register(reference, moved) * allowed)
        if abs(correlation(reference, moved)) < abs(correlation(reference, best)):
            break
        best = moved
    return (best * np.exp(-1j * np.angle(correlation(reference, best)))).astype(np.complex64)


def resample(
    source: Reconstruction,
    voxel_size: tuple[float, float, float],
    shape: tuple[int, int, int],
    shear: tuple[float, float],
) -> np.ndarray:
    """Sample an object on another grid and in another shear, band-limited to the coarser of the grids.

    Along each axis by sinc interpolation, which low-passes where the new voxel is larger, so that nothing
    aliases. Origin stays on origin. The object must be compact: it is taken as zero outside its array.

    Parameters
    ----------
    source : Reconstruction
    voxel_size, shape : tuple
        Of the new grid (zeta, y', x'), m and voxels.
    shear : tuple of float
        (shear_x, shear_y) of the new grid; (0, 0) is orthogonal.

    Returns
    -------
    image : ndarray, `shape`, complex64
    """
    image, first = _trim(source.image)
    positions = [
        (np.arange(image.shape[a]) + first[a] - source.image.shape[a] // 2) * source.voxel_size[a]
        for a in range(3)
    ]
    wanted = [(np.arange(shape[a]) - shape[a] // 2) * voxel_size[a] for a in range(3)]
    # In-plane the shear is applied on the finer of the two grids: it widens the in-plane spectrum.
    for axis in (1, 2):
        if voxel_size[axis] < source.voxel_size[axis]:
            image = _interpolate(image, positions[axis], wanted[axis], source.voxel_size[axis], axis)
            positions[axis] = wanted[axis]
    image = _shear_and_interpolate(
        image,
        positions,
        wanted[0],
        max(voxel_size[0], source.voxel_size[0]),
        (shear[0] - source.shear[0], shear[1] - source.shear[1]),
    )
    for axis in (1, 2):
        if positions[axis] is not wanted[axis]:
            image = _interpolate(image, positions[axis], wanted[axis], voxel_size[axis], axis)
    return image


def resample_support(
    source: Reconstruction,
    voxel_size: tuple[float, float, float],
    shape: tuple[int, int, int],
    shear: tuple[float, float],
) -> np.ndarray:
    """The support of `source` on another grid, bool: where more than half of a voxel lies in it."""
    solid = replace(source, image=source.support.astype(np.complex64))
    return np.real(resample(solid, voxel_size, shape, shear)) > 0.5


def _interpolate(image: np.ndarray, at: np.ndarray, to: np.ndarray, voxel: float, axis: int) -> np.ndarray:
    """Sinc interpolation from points `at` to points `to` along `axis`, band limit ``1 / (2 voxel)``."""
    spacing = at[1] - at[0] if len(at) > 1 else voxel
    kernel = (np.sinc((to[:, None] - at) / voxel) * (spacing / voxel)).astype(np.float32)
    return np.moveaxis(np.tensordot(kernel, image, (1, axis)), 0, axis)


def _shear_and_interpolate(
    image: np.ndarray,
    positions: list[np.ndarray],
    wanted: np.ndarray,
    voxel: float,
    shear: tuple[float, float],
) -> np.ndarray:
    """``out(zeta, y, x) = image(zeta + shear_x x + shear_y y, y, x)``, band-limited along zeta."""
    z, y, x = positions
    if shear == (0.0, 0.0):
        return _interpolate(image, z, wanted, voxel, 0)
    out = np.empty((len(wanted), *image.shape[1:]), np.complex64)
    spacing = z[1] - z[0] if len(z) > 1 else voxel
    span = abs(shear[0]) * np.ptp(x) + abs(shear[1]) * np.ptp(y) + np.ptp(z) + np.ptp(wanted)
    n: int = int(next_fast_len(int(np.ceil(span / spacing)) + len(z) + 8) or 0)
    f = np.fft.fftfreq(n, spacing)
    kept = np.abs(f) * 2 * voxel <= 1 + 1e-9
    f = f[kept]
    back = np.exp(2j * np.pi * np.outer(wanted - z[0], f)).astype(np.complex64) / n
    for row in range(image.shape[1]):
        spectrum = np.fft.fft(image[:, row], n, axis=0)[kept]
        offset = shear[0] * x - shear[1] * y[row]  # rows run to -y'
        spectrum *= np.exp(2j * np.pi * np.outer(f, offset))
        out[:, row] = back @ spectrum
    return out


def _trim(image: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Cut away empty borders; also the index of the first voxel kept."""
    box = bounding_box(image != 0)
    return image[box].astype(np.complex64), tuple(s.start for s in box)


def bounding_box(where: np.ndarray) -> tuple[slice, ...]:
    """Smallest box that holds every True; the whole array when there is none."""
    box = []
    for axis in range(where.ndim):
        along = np.flatnonzero(where.any(axis=tuple(a for a in range(where.ndim) if a != axis)))
        box.append(slice(int(along[0]), int(along[-1]) + 1) if along.size else slice(0, where.shape[axis]))
    return tuple(box)


def _fftn(image: np.ndarray) -> np.ndarray:
    return fftn(image.astype(np.complex64), overwrite=True)


def _on_axis(values: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    return values.astype(np.complex64).reshape([-1 if a == axis else 1 for a in range(ndim)])


def _peak(spectrum: np.ndarray, precision: float) -> np.ndarray:
    """Where ``|sum_k spectrum(k) exp(2 pi i k x / n)|`` is greatest, in voxels of the conjugate space."""
    surface = np.abs(ifftn(spectrum))
    coarse = np.unravel_index(np.argmax(surface), surface.shape)
    centre = np.array([c - n if c > n // 2 else c for c, n in zip(coarse, surface.shape, strict=True)], float)
    step = 0.5
    while step > precision / 2:
        offsets = step * np.arange(-2, 3)
        fine = spectrum
        for n, c in zip(spectrum.shape, centre, strict=True):
            kernel = np.exp(2j * np.pi * np.outer(c + offsets, np.fft.fftfreq(n))).astype(np.complex64)
            fine = np.tensordot(fine, kernel, (0, 1))  # consumes the first axis, appends the fine one
        best = np.unravel_index(np.argmax(np.abs(fine)), fine.shape)
        centre = centre + offsets[np.array(best)]
        step /= 2
    return centre
