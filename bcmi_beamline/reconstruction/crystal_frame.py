"""The crystal in its own frame: one axis along Q, cubic voxels, displacement and strain beside it."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from bcmi_beamline.geometry import Geometry
from bcmi_beamline.reconstruction.strain import displacement, orthogonalise
from bcmi_beamline.scans import Reconstruction


def crystal_axes(geometry: Geometry) -> np.ndarray:
    """Rows x, y, q of the crystal frame in the detector frame (x', y', z'), right-handed, shape (3, 3).

    q lies along Q. In the horizontal geometry y = y', in the vertical geometry x = x': the axis about which
    the crystal rocks, which is perpendicular to Q.
    """
    q = geometry.detector_frame @ geometry.q_vector / geometry.q_norm
    rocking = geometry.detector_frame @ geometry.rocking_axis
    if geometry.arm == "horizontal":
        return np.stack([np.cross(rocking, q), rocking, q])
    return np.stack([rocking, np.cross(q, rocking), q])


def crystal_frame(result: Reconstruction, voxel_size: float | None = None) -> dict[str, np.ndarray]:
    """Turn a reconstruction into the frame of its crystal.

    Parameters
    ----------
    result : Reconstruction
    voxel_size : float, optional
        m; the smallest voxel of `result` by default.

    Returns
    -------
    dict
        ``data`` complex64, ``displacement`` (m, along Q, mean zero) and ``strain`` float32, NaN outside the
        support, on axes (q, y, x), rows to -y, origin at ``n // 2``; ``voxel_size`` (3,) m; ``axes`` (3, 3):
        x, y, q in the detector frame.

    Notes
    -----
    Phases stay small from voxel to voxel where amplitudes do not vanish, so the complex amplitude itself is
    interpolated and nothing is unwrapped on the way. ``eps = -d(phase)/dq / |Q|``.
    """
    straight = orthogonalise(result, voxel_size)
    axes = crystal_axes(result.geometry)
    flip = np.diag([1.0, -1.0, 1.0])  # (axis 0, rows, columns) against (q, y, x): rows run down
    # output (q, y, x) -> input (z', y', x'): columns of the transpose, in reversed order of components
    turn = flip @ axes.T[::-1, ::-1] @ flip
    reach = np.abs(turn.T) @ np.array(straight.image.shape)
    shape = tuple(2 * int(np.ceil(n / 2)) for n in reach)
    offset = np.array(straight.image.shape) // 2 - turn @ (np.array(shape) // 2)

    def turned(values: np.ndarray, order: int) -> np.ndarray:
        return ndimage.affine_transform(values, turn, offset.tolist(), shape, order=order)

    image = turned(np.real(straight.image), 3) + 1j * turned(np.imag(straight.image), 3)
    support = turned(straight.support.astype(np.float32), 1) > 0.5
    image = np.where(support, image, 0).astype(np.complex64)
    voxel = straight.voxel_size[0]
    slope = np.imag(image.conj() * np.gradient(image, voxel, axis=0))
    density = np.maximum(np.abs(image) ** 2, np.finfo(np.float32).tiny)
    strain = np.where(support, -slope / density / result.geometry.q_norm, np.nan)
    in_place = Reconstruction(
        image=image,
        support=support,
        voxel_size=straight.voxel_size,
        geometry=result.geometry,
        shear=(0.0, 0.0),
    )
    return {
        "data": image,
        "displacement": displacement(in_place),
        "strain": strain.astype(np.float32),
        "voxel_size": np.array(straight.voxel_size),
        "axes": axes,
    }
