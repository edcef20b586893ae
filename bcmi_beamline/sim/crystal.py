"""The simulated crystal: a faceted platinum particle with a displacement field along Q."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.spatial import HalfspaceIntersection

from bcmi_beamline.config import CrystalSettings
from bcmi_beamline.geometry import Geometry, rotation_matrix

RELAXATION_DEPTH = 50e-9
"""Depth over which the displacement of the surface dies away, m."""

SLOW_OVERSAMPLING = 2
"""Voxels are finer along z' by this: rocking alone resolves z', up to the outermost angle."""


@dataclass(frozen=True)
class Crystal:
    """A crystal sampled on an orthogonal grid of the detector frame, axes (z', y', x').

    Rows run to -y'; the origin of coordinates lies at index ``n // 2`` of every axis.

    Parameters
    ----------
    density : ndarray, (Nz, Ny, Nx), float32
        Fraction of each voxel that is filled, 0 to 1.
    displacement : ndarray, (Nz, Ny, Nx), float32
        Component of the displacement along Q, m.
    voxel_size : tuple of float
        (z', y', x'), m.
    q_vector : ndarray, (3,)
        Q in the detector frame (x', y', z'), rad/m.
    """

    density: np.ndarray
    displacement: np.ndarray
    voxel_size: tuple[float, float, float]
    q_vector: np.ndarray

    @property
    def q_norm(self) -> float:
        """|Q|, rad/m."""
        return float(np.linalg.norm(self.q_vector))

    @property
    def axes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Coordinates z', y', x' of the voxel centres, m; y' falls with the row."""
        z, y, x = (
            (np.arange(n) - n // 2) * h for n, h in zip(self.density.shape, self.voxel_size, strict=True)
        )
        return z, -y, x

    def image(self) -> np.ndarray:
        """``|rho| exp(-i Q.u)``, (Nz, Ny, Nx), complex64."""
        return (self.density * np.exp(-1j * self.q_norm * self.displacement)).astype(np.complex64)

    def strain(self) -> np.ndarray:
        """Strain ``du_Q / dx_Q``, (Nz, Ny, Nx), float32; meaningful where the density is."""
        return _strain(self.displacement, self.voxel_size, self.q_vector)

    def interior(self) -> np.ndarray:
        """Voxels filled more than half, bool (Nz, Ny, Nx)."""
        return self.density > 0.5


def make_crystal(settings: CrystalSettings, voxel: float, geometry: Geometry) -> Crystal:
    """Grow the crystal that `settings` describes.

    Parameters
    ----------
    settings : CrystalSettings
    voxel : float
        Grid along x' and y', m; z' is sampled `SLOW_OVERSAMPLING` times finer.
    geometry : Geometry
        Gives Q in the detector frame.

    Returns
    -------
    Crystal
        The displacement has no mean gradient, so that the Bragg peak of the whole crystal, weighted by
        intensity, lies at Q. The dislocation, where there is one, comes on top of the scaled strain.
    """
    rng = np.random.default_rng(settings.seed)
    size = np.array(settings.size_nm) * 1e-9
    q_vector = geometry.detector_frame @ geometry.q_vector
    normals, offsets = _facets(q_vector / np.linalg.norm(q_vector), size, rng)

    spacing = np.array([voxel, voxel, voxel / SLOW_OVERSAMPLING])
    edge = settings.edge_nm * 1e-9
    count = 2 * np.ceil((size / 2 + edge) / spacing).astype(int) + 3
    x, y, z = ((np.arange(n) - n // 2) * h for n, h in zip(count, spacing, strict=True))
    xyz = (x[None, None, :], -y[None, :, None], z[:, None, None])

    depth = np.full((len(z), len(y), len(x)), np.inf, np.float32)
    for normal, offset in zip(normals, offsets, strict=True):
        np.minimum(depth, offset - sum(n * c for n, c in zip(normal, xyz, strict=True)), out=depth)
    density = np.clip(0.5 + depth / edge, 0, 1).astype(np.float32)

    voxel_size = (float(spacing[2]), voxel, voxel)
    inside = density > 0.5
    smooth = _smooth_displacement(xyz, np.maximum(depth, 0), size, q_vector, rng)
    smooth = _without_mean_gradient(smooth, density, xyz, voxel_size)
    low, high = np.percentile(_strain(smooth, voxel_size, q_vector)[inside], [1, 99])
    displacement = smooth * (2 * settings.strain / (high - low))
    if settings.dislocation:
        displacement = displacement + _edge_dislocation(xyz, size, q_vector)
    return Crystal(density, displacement.astype(np.float32), voxel_size, q_vector)


def _facets(q_hat: np.ndarray, size: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Outward normals (14, 3) and distances (14,) of {111} and {100}, [111] along Q, fitted to `size`.

    Growth makes no two facets equal, which also keeps the particle from having a centre of symmetry.
    """
    octahedral = np.array(list(product((1, -1), repeat=3))) / np.sqrt(3)
    cubic = np.vstack([np.eye(3), -np.eye(3)])
    normals = np.vstack([octahedral, cubic]) @ _orientation(q_hat, rng.uniform(0, 2 * np.pi)).T
    offsets = np.r_[np.full(8, 1.0), np.full(6, 1.15)] * rng.uniform(0.85, 1.15, 14)

    corners = HalfspaceIntersection(np.c_[normals, -offsets], np.zeros(3)).intersections
    scale = np.ptp(corners, axis=0) / size
    middle = (corners.max(axis=0) + corners.min(axis=0)) / 2
    offsets = offsets - normals @ middle
    normals = normals * scale
    length = np.linalg.norm(normals, axis=1)
    return normals / length[:, None], offsets / length


def _orientation(q_hat: np.ndarray, azimuth: float) -> np.ndarray:
    """Rotation from the cubic axes to the detector frame that puts [111] along `q_hat`."""
    z = np.ones(3) / np.sqrt(3)
    axis = np.cross(z, q_hat)
    turn = rotation_matrix(axis / np.linalg.norm(axis), float(np.arccos(np.clip(z @ q_hat, -1, 1))))
    return rotation_matrix(q_hat, azimuth) @ turn


def _smooth_displacement(
    xyz: tuple[np.ndarray, ...],
    depth: np.ndarray,
    size: np.ndarray,
    q_vector: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Band-limited random field, bending and surface relaxation, of arbitrary scale.

    A function of the coordinates alone, so that the crystal does not depend on the grid.
    """
    x, y, z = xyz
    length = float(np.exp(np.mean(np.log(size))))
    field = np.zeros(depth.shape)
    for _ in range(24):
        k = rng.normal(size=3)
        k *= 2 * np.pi / (length * rng.uniform(0.7, 1.6) * np.linalg.norm(k))
        wave = np.exp(1j * k[2] * z) * np.exp(1j * k[1] * y) * np.exp(1j * k[0] * x)
        field += rng.normal() / np.linalg.norm(k) * (wave * np.exp(1j * rng.uniform(0, 2 * np.pi))).real
    field /= field.std()

    bent = 1.6 * (2 * y / size[1]) ** 2 + 0.8 * (2 * z / size[2]) * (2 * y / size[1])
    q_hat = q_vector / np.linalg.norm(q_vector)
    along = q_hat[0] * x + q_hat[1] * y + q_hat[2] * z
    relaxed = np.exp(-depth / RELAXATION_DEPTH) * along / np.abs(along).max()
    return field + bent + 0.5 * relaxed


def _without_mean_gradient(
    u: np.ndarray,
    density: np.ndarray,
    xyz: tuple[np.ndarray, ...],
    voxel_size: tuple[float, float, float],
) -> np.ndarray:
    """Take the ramp off `u` that would move the centre of mass of the diffracted intensity.

    The centre of mass of ``|F|^2`` is the gradient of the phase averaged with the weight ``|rho|^2``.
    """
    weight = density**2
    weight /= weight.sum()
    dz, dy, dx = np.gradient(u, *voxel_size)
    slope = (float((weight * dx).sum()), -float((weight * dy).sum()), float((weight * dz).sum()))
    return u - sum(g * c for g, c in zip(slope, xyz, strict=True))


def _strain(
    displacement: np.ndarray, voxel_size: tuple[float, float, float], q_vector: np.ndarray
) -> np.ndarray:
    """Directional derivative of the displacement along Q; rows run to -y'."""
    qx, qy, qz = q_vector / np.linalg.norm(q_vector)
    dz, dy, dx = np.gradient(displacement, *voxel_size)
    return (qx * dx - qy * dy + qz * dz).astype(np.float32)


def _edge_dislocation(xyz: tuple[np.ndarray, ...], size: np.ndarray, q_vector: np.ndarray) -> np.ndarray:
    """Displacement along Q of an edge dislocation whose Burgers vector has one plane along Q, m.

    Isotropic elasticity (Hirth and Lothe, Theory of Dislocations), Poisson's ratio of platinum; the line
    runs along y', an eighth of the crystal off its centre.
    """
    x, _, z = xyz
    q_norm = np.linalg.norm(q_vector)
    burgers, poisson = 2 * np.pi / q_norm, 0.38
    qx, _, qz = q_vector / q_norm
    a = qx * (x - size[0] / 8) + qz * z
    b = -qz * (x - size[0] / 8) + qx * z
    core = 1e-9**2
    u = burgers / (2 * np.pi) * (np.arctan2(b, a) + a * b / (2 * (1 - poisson) * (a**2 + b**2 + core)))
    return np.broadcast_to(u, np.broadcast_shapes(*(c.shape for c in xyz)))
