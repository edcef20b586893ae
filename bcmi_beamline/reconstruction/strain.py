"""Displacement and strain along Q from the phase of an object, and the object in an orthogonal frame."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage
from skimage.restoration import unwrap_phase

from bcmi_beamline.reconstruction.alignment import resample, resample_support
from bcmi_beamline.scans import Reconstruction


@dataclass
class StrainField:
    """Displacement and strain along Q on the grid of the object.

    Parameters
    ----------
    displacement : ndarray, (Nz, Ny, Nx), float32
        ``u . Q / |Q|``, m, mean zero in each connected part; NaN outside the support.
    strain : ndarray, (Nz, Ny, Nx), float32
        ``du_Q / dx_Q``, dimensionless; NaN where no neighbour lies in the support.
    """

    displacement: np.ndarray
    strain: np.ndarray


def strain_field(result: Reconstruction) -> StrainField:
    """Displacement and strain along Q, with ``phase = -Q . u``."""
    return StrainField(displacement(result), strain(result))


def phase_gradient(result: Reconstruction) -> np.ndarray:
    """Gradient of the phase in the detector frame (x', y', z'), rad/m, shape (3, Nz, Ny, Nx).

    ``Im(rho* d rho) / |rho|^2`` with the difference taken as the angle between neighbours, which stays exact
    until they are half a turn apart and never unwraps anything. Neighbours outside the support do not count;
    NaN where there are none. In the sheared frame the chain rule gives ``d/dz' = d/dzeta`` and
    ``d/dx' = d/dx - shear_x d/dzeta``, and rows run to -y'.
    """
    rho = np.where(result.support, result.image, 0)
    d_zeta, d_row, d_x = (_slope(rho, axis) / result.voxel_size[axis] for axis in range(3))
    shear_x, shear_y = result.shear
    return np.stack([d_x - shear_x * d_zeta, -d_row - shear_y * d_zeta, d_zeta])


def _slope(rho: np.ndarray, axis: int) -> np.ndarray:
    """Phase step per voxel along `axis`, from one or both neighbours."""
    first = [slice(None)] * rho.ndim
    last = [slice(None)] * rho.ndim
    first[axis], last[axis] = slice(None, -1), slice(1, None)
    steps = rho[tuple(last)] * np.conj(rho[tuple(first)])
    total = np.zeros_like(rho)
    total[tuple(first)] += steps
    total[tuple(last)] += steps
    return np.where(total == 0, np.nan, np.angle(total)).astype(np.float32)


def strain(result: Reconstruction) -> np.ndarray:
    """``eps = du_Q / dx_Q = -grad(phase) . Q / |Q|^2``, dimensionless, NaN outside the support."""
    geometry = result.geometry
    q = geometry.detector_frame @ geometry.q_vector
    slope = np.tensordot((-q / geometry.q_norm**2).astype(np.float32), phase_gradient(result), 1)
    return np.where(result.support, slope, np.nan).astype(np.float32)


def displacement(result: Reconstruction) -> np.ndarray:
    """``u_Q = -phase / |Q|``, m, unwrapped within the support; mean zero in each connected part."""
    phase = np.ma.array(np.angle(result.image), mask=~result.support)
    unwrapped = np.asarray(np.ma.filled(unwrap_phase(phase, rng=0), np.nan), np.float32)
    field = -unwrapped / np.float32(result.geometry.q_norm)
    parts = np.zeros(field.shape, np.int32)
    ndimage.label(result.support, output=parts)
    for part in range(1, int(parts.max()) + 1):
        field[parts == part] -= field[parts == part].mean()
    return field


def orthogonalise(result: Reconstruction, voxel_size: float | None = None) -> Reconstruction:
    """The object on an orthogonal grid (z', y', x') of the detector frame.

    Parameters
    ----------
    result : Reconstruction
    voxel_size : float, optional
        m; the smallest of the source's voxels by default.

    Returns
    -------
    orthogonal : Reconstruction
        Cubic voxels, ``shear`` (0, 0), an array just large enough.
    """
    voxel = voxel_size or min(result.voxel_size)
    cubic = (voxel, voxel, voxel)
    shape = orthogonal_shape(result, cubic)
    return replace(
        result,
        image=resample(result, cubic, shape, (0.0, 0.0)),
        support=resample_support(result, cubic, shape, (0.0, 0.0)),
        voxel_size=cubic,
        shear=(0.0, 0.0),
        metadata={**result.metadata, "frame": "orthogonal, detector (z', y', x')"},
    )


def orthogonal_shape(
    result: Reconstruction, voxel_size: tuple[float, float, float], shear: tuple[float, float] = (0.0, 0.0)
) -> tuple[int, int, int]:
    """Even shape that holds the support about the origin in a grid of another shear, a margin included."""
    n = result.image.shape
    index = np.argwhere(result.support if result.support.any() else np.ones(n, bool))
    zeta, y, x = ((index - np.array(n) // 2) * result.voxel_size).T
    z = zeta + (result.shear[0] - shear[0]) * x - (result.shear[1] - shear[1]) * y  # rows run to -y'
    half = [float(np.abs(r).max()) for r in (z, y, x)]
    nz, ny, nx = (2 * (int(np.ceil(h / v)) + 4) for h, v in zip(half, voxel_size, strict=True))
    return nz, ny, nx
