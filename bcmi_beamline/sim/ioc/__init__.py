"""The simulated beamline's input-output controller: ``python -m bcmi_beamline.sim.ioc``."""
