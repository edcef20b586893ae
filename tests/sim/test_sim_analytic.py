"""The whole chain against what textbooks and tables say."""

import numpy as np
import pytest
import xraydb
from scipy import constants
from twins import BEAMLINE, GAPLESS, OUT, body, middle_of, quiet_preset, rate_of, rate_out, sphere

from bcmi_beamline.geometry import rotation_matrix
from bcmi_beamline.sim import Twin
from bcmi_beamline.sim.crystal import Crystal, make_crystal
from bcmi_beamline.sim.modulator import ModulatorChip

WIDE = {"beam_fwhm_um": 1000.0}
FINER = 5  # points per pixel along an edge at which a formula is averaged


def q_of_pixels(pixels, beamline=BEAMLINE):
    """Angular frequency along x' or -y' at FINER points of every pixel of a window, rad/m."""
    index = (np.arange(pixels * FINER) + 0.5) / FINER - 0.5 - pixels // 2
    geometry = beamline.geometry()
    return geometry.wavenumber * index * geometry.pixel_size / geometry.detector_distance


def per_pixel(intensity):
    n = len(intensity) // FINER
    return intensity.reshape(n, FINER, n, FINER).mean(axis=(1, 3))


def pattern(form_factor, angle_deg, pixels):
    """|F|^2 on the window when the crystal is rocked by an angle, from its form factor F(qx, qy, qz)."""
    geometry = BEAMLINE.geometry()
    turn = rotation_matrix(geometry.rocking_axis, np.deg2rad(angle_deg))
    qx, qy, qz = geometry.detector_frame @ (turn @ geometry.q_vector - geometry.q_vector)
    q = q_of_pixels(pixels)
    return per_pixel(np.abs(form_factor(q[None, :] - qx, -q[:, None] - qy, -qz)) ** 2)


@pytest.mark.parametrize("angle_deg", [0.0, 0.1])
def test_box_has_its_form_factor(angle_deg):
    voxel = 2.5e-9
    sides = np.array([101, 75, 121]) * voxel  # x', y', z'
    twin = Twin(GAPLESS, quiet_preset(**WIDE), body(np.ones((121, 75, 101)), voxel))
    seen, peak = rate_out(twin, phi=angle_deg), rate_out(twin).max()

    def box(*q):
        return np.prod(
            np.broadcast_arrays(*[np.sinc(k * s / (2 * np.pi)) for k, s in zip(q, sides, strict=True)]),
            axis=0,
        )

    expected, at_peak = (pattern(box, angle, len(seen)) for angle in (angle_deg, 0.0))
    np.testing.assert_allclose(seen / peak, expected / at_peak.max(), atol=3e-3 * expected.max())


@pytest.mark.parametrize("angle_deg", [0.0, -0.15])
def test_sphere_has_its_form_factor(angle_deg):
    twin = Twin(GAPLESS, quiet_preset(**WIDE), sphere(240e-9, 3e-9))
    seen, peak = rate_out(twin, phi=angle_deg), rate_out(twin).max()

    def ball(*q):
        t = np.sqrt(sum(k**2 for k in q)) * 120e-9 + 1e-3
        return 3 * (np.sin(t) - t * np.cos(t)) / t**3

    expected, at_peak = (pattern(ball, angle, len(seen)) for angle in (angle_deg, 0.0))
    np.testing.assert_allclose(seen / peak, expected / at_peak.max(), atol=5e-3 * expected.max())


def test_bragg_peak_follows_the_energy_as_xrayutilities_says():
    xrayutilities = pytest.importorskip("xrayutilities")
    lattice = xrayutilities.materials.SGLattice(225, 3.9236, atoms=["Pt"], pos=["4a"])
    q = xrayutilities.materials.Crystal("Pt", lattice).Q(1, 1, 1)
    angles = [xrayutilities.HXRD([1, 1, -2], [1, 1, 1], en=energy).Q2Ang(q) for energy in (9000, 9010)]
    omega, two_theta = (float(angles[1][i] - angles[0][i]) for i in (0, 3))
    twin = Twin(GAPLESS, quiet_preset(), sphere(200e-9, 5e-9))
    followed = twin.aligned_pose() | OUT
    followed |= {
        "energy": 9.01,
        "phi": followed["phi"] + omega,
        "nu": followed["nu"] + two_theta,
    }
    shift = twin._beam_pixel(followed) - np.rint(twin._beam_pixel(followed))
    rate = twin._rate(followed, tuple(shift), 0.0)
    # the window stands where the beam of the configured energy would go; the light is where this one does
    place = middle_of(rate) + np.rint(twin._beam_pixel(followed)) - twin._beam_pixel(twin.aligned_pose())
    np.testing.assert_allclose(place, 0, atol=0.05)
    nominal = rate_out(twin)
    assert rate.sum() == pytest.approx(nominal.sum(), rel=0.05)  # the lens is a little out of focus
    assert rate_out(twin, energy=0.01).sum() < 0.9 * nominal.sum()
    assert rate_out(twin, energy=1.0) is None


@pytest.mark.parametrize("energy", [8000.0, 9000.0, 12000.0])
def test_tungsten_refracts_as_its_scattering_factors_say(energy):
    """Delta and beta from Chantler's f1 and f2, written out; the twin's come from another table of xraydb."""
    f1 = 74 + float(np.squeeze(xraydb.f1_chantler("W", energy)))
    f2 = float(np.squeeze(xraydb.f2_chantler("W", energy)))
    atoms = 19.25e6 / 183.84 * constants.N_A
    wavelength = constants.h * constants.c / constants.e / energy
    radius = constants.physical_constants["classical electron radius"][0]
    factor = radius * wavelength**2 * atoms / (2 * np.pi)
    exponent = ModulatorChip(quiet_preset().sim.modulator, 9000.0).exponent(energy)
    wavenumber = 2 * np.pi / wavelength
    assert -exponent.imag / wavenumber == pytest.approx(factor * f1, rel=0.01)
    assert -exponent.real / wavenumber == pytest.approx(factor * f2, rel=0.06)


def test_photons_are_conserved_from_the_crystal_to_the_detector():
    settings = quiet_preset()
    twin = Twin(GAPLESS, settings, sphere(300e-9, 10e-9))
    assert rate_out(twin).sum() == pytest.approx(settings.sim.peak_counts_per_s, rel=0.01)
    bare = rate_of(twin, x=100.0)
    assert bare.sum() == pytest.approx(settings.sim.peak_counts_per_s, rel=0.01)
    pixel = 15e-9
    probe, film = twin.truth_probe(pixel, 400), twin.truth_modulator(pixel, (400, 400))
    assert (np.abs(probe) ** 2).sum() == pytest.approx(settings.sim.peak_counts_per_s, rel=0.01)
    absorbed = (np.abs(probe * film) ** 2).sum() / (np.abs(probe) ** 2).sum()
    assert 0.75 < absorbed < 0.95
    # what the film scatters beyond the window is lost
    assert rate_of(twin).sum() / bare.sum() == pytest.approx(absorbed, abs=0.01)


def mirrored(beamline, settings, original, flip):
    """A twin that is the mirror image of `original`: crystal and pattern turned over by `flip`."""
    made = original.crystal
    q = beamline.geometry().detector_frame @ beamline.geometry().q_vector
    crystal = Crystal(flip(made.density), flip(made.displacement), made.voxel_size, q)
    twin = Twin(beamline, settings, crystal)
    pattern = np.pad(original.chip.pattern, ((0, 1), (0, 1)))  # odd, so that the centre stays in place
    twin.chip.__dict__["pattern"] = flip(pattern[None])[0][: pattern.shape[0] - 1, : pattern.shape[1] - 1]
    return twin


@pytest.fixture(scope="module")
def right():
    settings = quiet_preset()
    crystal = make_crystal(settings.sim.crystal, 10e-9, GAPLESS.geometry())
    return Twin(GAPLESS, settings, crystal)


@pytest.mark.parametrize("angle_deg", [0.0, 0.04])
def test_arm_to_the_left_gives_the_mirror_image(right, angle_deg):
    arm = GAPLESS.model_copy(update={"arm_sign": -1})
    left = mirrored(arm, quiet_preset(), right, lambda a: a[:, :, ::-1])
    for moves in ({}, {"x": 0.4, "y": 0.3}, OUT):
        a = rate_of(right, phi=angle_deg, **moves)
        b = rate_of(left, phi=-angle_deg, **(moves | {"x": -moves.get("x", 0.0)}))
        # pixel 0 of an even window has no partner
        np.testing.assert_allclose(b[:, 1:], a[:, :0:-1], atol=2e-3 * a.max())
    assert np.abs(a[:, 1:] - a[:, :0:-1]).max() > 0.1 * a.max()


@pytest.mark.parametrize("angle_deg", [0.0, 0.04])
def test_arm_upwards_gives_the_transposed_image_and_what_polarisation_saves(right, angle_deg):
    arm = GAPLESS.model_copy(update={"arm": "vertical", "rocking_circle": "eta"})
    up = mirrored(arm, quiet_preset(), right, lambda a: a[:, ::-1, ::-1].transpose(0, 2, 1))
    up_pose = up.aligned_pose()
    for moves in ({}, {"x": 0.4, "y": 0.3}):
        a = rate_of(right, phi=angle_deg, **moves)
        # seen in this mirror the sense of a rotation turns over; eta carries the modulator along
        pose = up.hold_modulator(up_pose | {"eta": up_pose["eta"] - angle_deg})
        pose |= {"x": pose["x"] + moves.get("y", 0.0), "y": pose["y"] + moves.get("x", 0.0)}
        b = up._rate(pose, (0.0, 0.0), 0.0)
        b = b * np.cos(up.geometry.two_theta) ** 2
        np.testing.assert_allclose(b[1:, 1:], a[1:, 1:][::-1, ::-1].T, atol=5e-3 * a.max())


def test_held_modulator_stands_still_while_its_circle_turns(right):
    arm = GAPLESS.model_copy(update={"arm": "vertical", "rocking_circle": "eta"})
    hidden = {"mchi_deg": 0.9, "mphi_deg": -1.2, "pivot_um": [40.0, -60.0, 30.0], "distance_um": 7.0}
    twin = Twin(arm, quiet_preset(hidden=hidden), right.crystal)
    pose = twin.aligned_pose()
    for angle in (-0.5, 0.5):
        turned = pose | {"eta": pose["eta"] + angle}
        assert np.abs(twin._placement(turned).origin).max() > 5e-6
        held = twin._placement(twin.hold_modulator(turned))
        np.testing.assert_allclose(held.origin, 0, atol=1e-9)
        np.testing.assert_allclose(held.slope, 0, atol=1e-9)
        assert held.distance == pytest.approx(twin.truth_distance(), abs=1e-9)
