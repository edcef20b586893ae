import numpy as np
import pytest
import xraydb
from scipy import integrate
from twins import BEAMLINE, GAPLESS, middle_of, quiet_preset, rate_out, sphere

from bcmi_beamline.sim import Twin
from bcmi_beamline.sim.incident import FULL_CURRENT_MA, IncidentBeam
from bcmi_beamline.sim.optics import centred, fresnel_matrix

NOMINAL = BEAMLINE.slits.nominal_um


def incident(**sim):
    return IncidentBeam(BEAMLINE, quiet_preset(**sim).sim)


def at(**changes):
    return incident().nominal() | changes


@pytest.fixture(scope="module")
def twin():
    return Twin(GAPLESS, quiet_preset(), sphere(200e-9, 5e-9))


def test_nominal_beam_has_its_flux_width_and_no_curvature():
    beam = incident()
    assert beam.intensity(at()) == pytest.approx(1)
    for section in beam.sections(at(), 9000.0):
        assert section.waist * np.sqrt(2 * np.log(2)) == pytest.approx(1.5e-6)
        assert section.inverse.imag == 0 and section.tilt == 0
        assert section.coherence == np.inf


@pytest.mark.parametrize(("gap", "centre"), [(70.0, 0.0), (140.0, 300.0), (1000.0, -100.0)])
def test_slits_pass_their_part_of_a_gaussian_beam(gap, centre):
    width = quiet_preset().sim.slit_beam_um[0]

    def passed(gap, centre):
        def beam(x):
            return np.exp(-4 * np.log(2) * (x / width) ** 2)

        return integrate.quad(beam, centre - gap / 2, centre + gap / 2)[0]

    seen = incident().intensity(at(slits_horizontal=gap, slits_horizontal_centre=centre))
    assert seen == pytest.approx(passed(gap, centre) / passed(NOMINAL[0], 0), rel=1e-6)


def test_closed_slit_a_dumped_beam_and_an_empty_ring_are_dark(twin):
    for changes in ({"slits_vertical": 0.0}, {"beam": 0.0}, {"ring_current": 0.0}):
        assert incident().intensity(at(**changes)) == 0
        assert twin._rate(twin.aligned_pose() | changes, (0.0, 0.0), 0.0) is None
        assert twin.flux(0.0, changes) == 0


def test_flux_and_frames_follow_the_ring_current(twin):
    half = {"ring_current": FULL_CURRENT_MA / 2}
    assert twin.flux(0.0, half) == pytest.approx(twin.flux(0.0) / 2)
    assert rate_out(twin, ring_current=-FULL_CURRENT_MA / 2).sum() == pytest.approx(
        rate_out(twin).sum() / 2, rel=1e-5
    )


def test_filters_absorb_what_tables_say_and_multiply():
    """Against Chantler's tables; the twin takes Elam's."""
    beam = incident()
    one = beam.intensity(at(filter_al_80=1.0))
    assert one == pytest.approx(np.exp(-float(xraydb.mu_chantler("Al", 9000)) * 2.6989 * 80e-4), rel=0.03)
    both = beam.intensity(at(filter_al_80=1.0, filter_al_20=1.0))
    assert both == pytest.approx(one**1.25, rel=1e-6)
    harder = beam.intensity(at(filter_al_80=1.0, energy=12.0))
    assert harder == pytest.approx(one ** (9 / 12) ** 2.9, rel=0.02)


def test_monitor_stands_before_the_shutter(twin):
    assert twin.flux(0.0, {"shutter": 0.0}) == twin.flux(0.0) > 0


def test_narrower_slit_makes_a_wider_focus():
    horizontal, vertical = incident().sections(at(slits_horizontal=NOMINAL[0] / 2), 9000.0)
    assert horizontal.waist == pytest.approx(2 * vertical.waist)


def test_wider_slit_costs_coherence_and_narrows_the_focus_less_than_it_could():
    """A Schell-model beam: the degree of coherence falls as the slit opens (Mandel and Wolf, 5.6)."""
    nuisances = {"coherence_modes": 3, "coherence_length_um": [1.5, 6.0]}
    beam = incident(nuisances=nuisances)
    nominal, wide = (beam.sections(at(slits_horizontal=gap * NOMINAL[0]), 9000.0)[0] for gap in (1, 2))
    assert nominal.coherence == pytest.approx(1.5e-6)
    assert wide.coherence / wide.waist == pytest.approx(nominal.coherence / nominal.waist / 2)
    # width after the lens: divergence sqrt(1 + (2 s / c)^2) / s with 2 s / c = w / (focal coherence)
    degree = 2 * nominal.coherence / nominal.waist
    expected = np.sqrt((1 + 16 / degree**2) / (1 + 4 / degree**2)) / 2
    assert wide.waist / nominal.waist == pytest.approx(expected)
    assert 0.5 < expected < 1


@pytest.mark.parametrize("travel_mm", [-30.0, 45.0])
def test_lens_off_its_place_defocuses_like_free_space(travel_mm):
    """Against a numerical Fresnel integral of the focus."""
    focus, moved = (incident().sections(at(focus=z), 9000.0)[0] for z in (0.0, travel_mm))
    x, wavelength = centred(1201, 10e-9), 0.13776e-9
    target = centred(81, 50e-9)
    # a lens moved downstream takes the focus along: the crystal then sees the beam before its focus
    kernel = fresnel_matrix(target, x, wavelength, abs(travel_mm) * 1e-3)
    wave = kernel @ np.exp(-focus.inverse * x**2)
    wave = wave / wave[40] if travel_mm < 0 else np.conj(wave / wave[40])
    np.testing.assert_allclose(wave, np.exp(-moved.inverse * target**2), atol=2e-3)


def test_defocused_beam_is_weaker_on_the_crystal(twin):
    rayleigh = np.pi * incident().sections(at(), 9000.0)[0].waist ** 2 / twin.geometry.wavelength
    ratio = rate_out(twin, focus=40.0).sum() / rate_out(twin).sum()
    assert ratio == pytest.approx(1 / (1 + (0.04 / rayleigh) ** 2), rel=0.01)


def test_slit_off_its_axis_turns_the_incident_beam(twin):
    """By centre over focal length: the Bragg angle and the diffracted beam turn along."""
    offset, angle = 100.0, -100e-6 / BEAMLINE.focus.focal_length_m
    still, turned = (
        rate_out(twin, slits_horizontal_centre=offset, phi=phi) for phi in (0.0, np.rad2deg(angle))
    )
    flux = incident().intensity(at(slits_horizontal_centre=offset))
    assert turned.sum() == pytest.approx(flux * rate_out(twin).sum(), rel=1e-3) and turned.sum() > still.sum()
    np.testing.assert_allclose(middle_of(turned), [0, angle * 5.35 / 75e-6], atol=0.05)


def test_lens_focuses_further_away_at_higher_energy():
    later = incident().sections(at(energy=9.1), 9100.0)[0]
    same = incident().sections(at(focus=1e3 * ((9.1 / 9) ** 2 - 1)), 9000.0)[0]
    assert later.waist == pytest.approx(same.waist, rel=0.01)
    assert later.inverse.imag > 0  # before its focus the beam converges


def test_polarisation_costs_the_horizontal_plane_alone():
    vertical = BEAMLINE.model_copy(update={"arm": "vertical", "rocking_circle": "eta"})
    loss = np.cos(BEAMLINE.geometry().two_theta) ** 2
    assert loss == pytest.approx(0.664, abs=1e-3)
    for degree, gain in ((1.0, 1 / loss), (0.0, 1.0), (-1.0, loss)):
        settings = quiet_preset(polarisation=degree)
        flat, upright = (Twin(b, settings, sphere(60e-9, 10e-9, b)) for b in (BEAMLINE, vertical))
        assert flat._polarisation() == pytest.approx(1)
        assert upright._polarisation() == pytest.approx(gain)


def test_vertical_modes_widen_the_pattern_along_y_alone():
    def spread(**nuisances):
        twin = Twin(GAPLESS, quiet_preset(nuisances=nuisances), sphere(600e-9, 20e-9))
        rate = rate_out(twin)[132:252, 132:252]
        index = np.arange(120) - 60
        return np.array([rate.sum(axis) @ index**2 / rate.sum() for axis in (1, 0)])

    lengths = [1.5, 3.0]
    rows, columns = spread(coherence_modes_vertical=5, coherence_length_um=lengths) - spread()
    tilt = 1 / (3e-6 * BEAMLINE.geometry().wavenumber)
    assert rows == pytest.approx((tilt * 5.35 / 75e-6) ** 2, rel=0.05)
    assert columns == pytest.approx(0, abs=0.02)


def test_pose_has_what_the_beamline_has():
    bare = BEAMLINE.model_copy(update={"slits": None, "monochromator": None, "focus": None, "filters": {}})
    few = Twin(bare, quiet_preset(), sphere(60e-9, 10e-9))
    assert not {"slits_horizontal", "energy", "focus", "filter_al_20"} & set(few.nominal_pose())
    assert {"ring_current", "beam", "shutter"} <= set(few.nominal_pose())
    assert few.flux() == pytest.approx(1e10)
    full = Twin(BEAMLINE, quiet_preset(), sphere(60e-9, 10e-9)).nominal_pose()
    assert full["energy"] == 9.0 and full["slits_vertical"] == 300.0 and full["filter_al_160"] == 0
    assert full["slits_vertical_centre"] == full["focus"] == 0
