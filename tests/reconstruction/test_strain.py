"""Strain from phase: sign, size and frame, against displacement fields known analytically."""

import numpy as np
import pytest
from scipy import ndimage

from bcmi_beamline.geometry import Geometry
from bcmi_beamline.reconstruction.strain import displacement, orthogonalise, strain, strain_field
from bcmi_beamline.scans import Reconstruction


def sphere(geometry, shear, displacement_of_q, voxel=(12e-9, 20e-9, 18e-9), shape=(40, 24, 26)):
    """A ball of radius 160 nm, displaced along Q by a function of the coordinate along Q."""
    zeta, row, x = np.meshgrid(
        *((np.arange(n) - n // 2) * v for n, v in zip(shape, voxel, strict=True)), indexing="ij"
    )
    y = -row
    z = zeta + shear[0] * x + shear[1] * y
    q = geometry.detector_frame @ geometry.q_vector
    along = np.tensordot(q / geometry.q_norm, np.stack([x, y, z]), 1)
    support = x**2 + y**2 + z**2 < 160e-9**2
    image = support * np.exp(-1j * geometry.q_norm * displacement_of_q(along))
    return Reconstruction(image.astype(np.complex64), support, voxel, geometry, shear), along


@pytest.fixture(params=[("horizontal", 1), ("vertical", 1), ("vertical", -1)])
def geometry(request):
    return Geometry(arm=request.param[0], arm_sign=request.param[1])


@pytest.mark.parametrize("uniform", [1e-3, -2e-3])
def test_uniform_strain_keeps_its_sign_and_size(geometry, uniform):
    """A stretched lattice, u growing along Q, is positive strain, though its phase wraps many times."""
    crystal, along = sphere(geometry, geometry.shear, lambda s: uniform * s)
    field = strain_field(crystal)
    inner = ndimage.binary_erosion(crystal.support)
    assert field.strain[inner] == pytest.approx(uniform, rel=0.01)
    assert np.nanmax(np.abs(field.strain - uniform)) < 0.01 * abs(uniform)
    assert np.isnan(field.strain[~crystal.support]).all()
    off = field.displacement[inner] - uniform * along[inner]
    assert off == pytest.approx(off.mean(), abs=1e-12)
    assert abs(off.mean()) < 2e-12


def test_varying_strain(geometry):
    """u = b s^2 / 2 has strain b s."""
    crystal, along = sphere(geometry, geometry.shear, lambda s: 5e3 * s**2 / 2)
    inner = ndimage.binary_erosion(crystal.support) & (np.abs(along) < 100e-9)
    assert strain(crystal)[inner] == pytest.approx(5e3 * along[inner], abs=6e-5)


def test_displacement_is_free_of_the_global_phase():
    crystal, _ = sphere(Geometry(), Geometry().shear, lambda s: 1e-3 * s)
    turned, _ = sphere(Geometry(), Geometry().shear, lambda s: 1e-3 * s)
    turned.image *= np.complex64(np.exp(2.5j))
    inside = crystal.support
    assert displacement(turned)[inside] == pytest.approx(displacement(crystal)[inside], abs=1e-12)


def test_orthogonalised_ball_is_a_ball(geometry):
    crystal, _ = sphere(geometry, geometry.shear, lambda s: 1e-3 * s)
    straight = orthogonalise(crystal, 12e-9)
    assert straight.shear == (0.0, 0.0) and straight.voxel_size == (12e-9,) * 3
    r = np.meshgrid(*((np.arange(n) - n // 2) * 12e-9 for n in straight.image.shape), indexing="ij")
    radius = np.sqrt(r[0] ** 2 + r[1] ** 2 + r[2] ** 2)
    assert straight.support[radius < 145e-9].all()
    assert not straight.support[radius > 180e-9].any()
    inner = radius < 120e-9
    assert np.median(strain(straight)[inner]) == pytest.approx(1e-3, rel=0.02)
