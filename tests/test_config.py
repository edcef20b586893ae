"""Configuration files: what ships is valid, what is wrong is named."""

from pathlib import Path

import pytest

import bcmi_beamline
from bcmi_beamline.config import ConfigError, list_presets, load_beamline, load_preset

SHIPPED = Path(bcmi_beamline.__file__).parent / "config"


@pytest.mark.parametrize("name", list_presets())
def test_shipped_presets_fit_the_shipped_beamline(name):
    beamline, preset = load_beamline(), load_preset(name)
    z = beamline.nanogoniometer.z
    assert z.low <= preset.plan.modulator_z_um <= z.high
    assert preset.name == name
    half = preset.plan.window // 2
    assert half <= beamline.eiger.beam_row < beamline.eiger.rows - half
    assert half <= beamline.eiger.beam_column < beamline.eiger.columns - half
    assert preset.plan.align_half_range_deg < beamline.nanogoniometer.mchi.high


def test_the_gap_mask_is_the_published_one():
    mask = load_beamline().eiger.gap_mask()
    assert mask.shape == (2164, 1030)
    assert mask[511].all()
    assert mask[551].all()
    assert not mask[552, 300]
    assert mask[:, 513].all()


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('arm = "horizontal"', 'arm = "sideways"', "arm"),
        ("energy_ev = 9000.0", "energy_ev = -1.0", "energy_ev"),
        ("stand_off_um = 600.0", "stand_off_um = 5000.0", "nanogoniometer"),
        ('rocking_circle = "phi"', 'rocking_circle = "eta"', "rocks about y"),
        ("energy_ev = 9000.0", "energy_ev = 9000.0\nenergie = 1", "energie"),
        ("out  = { x = 5000.0", "out  = { x = 50000.0", "positions.out.x"),
        ("[reflection]", "[reflection", "TOML"),
    ],
)
def test_a_wrong_beamline_names_file_and_key_in_one_line(tmp_path, old, new, key):
    text = (SHIPPED / "sim-id01.toml").read_text()
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as error:
        load_beamline(path)
    assert "mine.toml" in str(error.value)
    assert key in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match="choose from extreme, paper-hs, paper-ls, small"):
        load_preset("huge")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_preset(tmp_path / "absent.toml")
