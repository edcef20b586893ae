"""Live table, plots, progress, and devices that print where they are."""

from bcmi_beamline.prompt import install_displays

install_displays(session)
