"""Live table, plots and progress."""

from bcmi_beamline.prompt import install_displays

install_displays(session)
