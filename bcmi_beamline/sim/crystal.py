"""The simulated crystal: a faceted particle with a displacement field along Q, or an array from a file."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path

import h5py
import numpy as np
from scipy.spatial import HalfspaceIntersection, QhullError

from bcmi_beamline.config import CrystalSettings, FacetSettings
from bcmi_beamline.geometry import Geometry, rotation_matrix

RELAXATION_DEPTH = 50e-9
"""Depth over which the displacement of the surface dies away, m."""

SLOW_OVERSAMPLING = 2
"""Voxels are finer along z' by this: rocking alone resolves z', up to the outermost angle."""

DEFAULT_FACETS = [FacetSettings(hkl=(1, 1, 1)), FacetSettings(hkl=(1, 0, 0), distance=1.15)]


@dataclass(frozen=True)
class Crystal:
    """A crystal sampled on an orthogonal grid of the detector frame, axes (z', y', x').

    Rows run to -y'; the origin of coordinates lies at index ``n // 2`` of every axis.

    Parameters
    ----------
    density : ndarray, (Nz, Ny, Nx), float32
        Fraction of each voxel that is filled, 0 to 1.
    displacement : ndarray, (Nz, Ny, Nx), float32
        Component of the displacement along Q, m; whole lattice planes may be missing.
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
        return _strain(self.displacement, self.voxel_size, self.q_vector, 2 * np.pi / self.q_norm)

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

    Raises
    ------
    ValueError
        In one line: when the facets enclose no body, or the file of an array cannot be used.
    """
    if settings.array is not None:
        return read_crystal(settings.array, settings.voxel_nm, geometry)
    rng = np.random.default_rng(settings.seed)
    size = np.array(settings.size_nm) * 1e-9
    q_vector = geometry.detector_frame @ geometry.q_vector
    normals, offsets = _facets(q_vector / np.linalg.norm(q_vector), size, settings, rng)

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
    smooth = _smooth_displacement(xyz, np.maximum(depth, 0), size, q_vector, settings, rng)
    smooth = _without_mean_gradient(smooth, density, xyz, voxel_size)
    low, high = np.percentile(_strain(smooth, voxel_size, q_vector)[inside], [1, 99])
    displacement = smooth * (2 * settings.strain / (high - low))
    if settings.dislocation:
        displacement = displacement + _edge_dislocation(xyz, size, q_vector)
    return Crystal(density, displacement.astype(np.float32), voxel_size, q_vector)


def read_crystal(path: Path, voxel_nm: tuple[float, float, float] | None, geometry: Geometry) -> Crystal:
    """Read a crystal from an array of ``|rho| exp(-i Q.u)`` on a grid of the detector frame.

    Parameters
    ----------
    path : Path
        .npy; .npz with `object` and, if it can, `voxel_size` (m); or HDF5 laid out like a result file,
        ``/entry_1/image_1/data`` and ``voxel_size``, without shear.
    voxel_nm : tuple of float, optional
        Where the file does not say.
    geometry : Geometry

    Raises
    ------
    ValueError
        In one line: what is wrong with the file.
    """
    try:
        image, voxel = (_read_npz if path.suffix in (".npy", ".npz") else _read_hdf5)(path)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: no crystal can be read from it: {str(error).strip()}") from None
    if voxel is None and voxel_nm is not None:
        voxel = np.array(voxel_nm) * 1e-9
    if voxel is None:
        raise ValueError(f"{path}: does not say its voxels: give voxel_nm = [z', y', x'] beside array")
    if image.ndim != 3 or np.shape(voxel) != (3,) or not np.all(np.asarray(voxel) > 0):
        raise ValueError(f"{path}: a crystal has three axes and three voxel sizes above 0, not {image.shape}")
    modulus = np.abs(image).astype(np.float32)
    if not np.isfinite(modulus).all() or not modulus.any():
        raise ValueError(f"{path}: the object must be finite and not zero everywhere")
    q_vector = geometry.detector_frame @ geometry.q_vector
    displacement = -np.angle(image).astype(np.float32) / np.float32(np.linalg.norm(q_vector))
    size = tuple(float(v) for v in voxel)
    return Crystal(modulus / modulus.max(), displacement, size, q_vector)  # pyright: ignore[reportArgumentType]


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    content = np.load(path, allow_pickle=False)
    if isinstance(content, np.ndarray):
        return content, None
    with content:
        return content["object"], content.get("voxel_size")


def _read_hdf5(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    with h5py.File(path) as file:
        found = (file.get(f"entry_1/image_1/{name}") for name in ("data", "voxel_size", "shear"))
        image, voxel, shear = (item[()] if isinstance(item, h5py.Dataset) else None for item in found)
    if image is None:
        raise ValueError("it holds no /entry_1/image_1/data")
    if np.any(shear):
        raise ValueError("its grid is sheared; write it on an orthogonal one")
    return image, voxel


def _facets(
    q_hat: np.ndarray, size: np.ndarray, settings: CrystalSettings, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Outward normals (n, 3) and distances (n,) of the facets, [111] along Q, fitted to `size`.

    Growth makes no two facets equal, which also keeps the particle from having a centre of symmetry.
    """
    families = [(_family(facet.hkl), facet.distance) for facet in settings.facets or DEFAULT_FACETS]
    azimuth = rng.uniform(0, 2 * np.pi)
    if settings.azimuth_deg is not None:
        azimuth = np.deg2rad(settings.azimuth_deg)
    normals = np.vstack([members for members, _ in families]) @ _orientation(q_hat, azimuth).T
    offsets = np.concatenate([np.full(len(members), distance) for members, distance in families])
    offsets = offsets * rng.uniform(1 - settings.unevenness, 1 + settings.unevenness, len(offsets))

    try:
        corners = HalfspaceIntersection(np.c_[normals, -offsets], np.zeros(3)).intersections
    except QhullError:
        corners = np.full((1, 3), np.inf)
    if not np.isfinite(corners).all():
        raise ValueError("sim.crystal.facets enclose no body: add families of facets that close it")
    scale = np.ptp(corners, axis=0) / size
    middle = (corners.max(axis=0) + corners.min(axis=0)) / 2
    offsets = offsets - normals @ middle
    normals = normals * scale
    length = np.linalg.norm(normals, axis=1)
    return normals / length[:, None], offsets / length


def _family(hkl: tuple[int, int, int]) -> np.ndarray:
    """Unit normals of all facets that cubic symmetry makes of one, (n, 3)."""
    members = {
        tuple(sign * index for sign, index in zip(signs, order, strict=True))
        for order in permutations(hkl)
        for signs in product((1, -1), repeat=3)
    }
    ordered = sorted(members, key=lambda m: (min(m) < 0, [-abs(i) for i in m], [-i for i in m]))
    return np.array(ordered) / np.linalg.norm(hkl)


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
    settings: CrystalSettings,
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
    return settings.random * field + settings.bending * bent + 0.5 * settings.relaxation * relaxed


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
    displacement: np.ndarray,
    voxel_size: tuple[float, float, float],
    q_vector: np.ndarray,
    plane_spacing: float = np.inf,
) -> np.ndarray:
    """Directional derivative of the displacement along Q; rows run to -y'.

    A step of whole lattice planes between two voxels is none.
    """
    qx, qy, qz = q_vector / np.linalg.norm(q_vector)
    strain = np.zeros(displacement.shape, np.float32)
    for axis, weight in enumerate((qz, -qy, qx)):
        step = np.diff(np.moveaxis(displacement, axis, 0), axis=0)
        if np.isfinite(plane_spacing):
            step -= plane_spacing * np.rint(step / plane_spacing)
        step *= weight / voxel_size[axis]
        out = np.moveaxis(strain, axis, 0)
        out[0] += step[0]
        out[1:-1] += (step[:-1] + step[1:]) / 2
        out[-1] += step[-1]
    return strain


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
