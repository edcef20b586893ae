"""The devices by their own names."""

devices = session.devices
nanogoniometer = devices.nanogoniometer
diffractometer = devices.diffractometer
eiger = devices.eiger
shutter = devices.shutter
monitor = devices.monitor
ring_current = devices.ring_current
sample_stage = devices.sample_stage
slits, energy, focus = devices.slits, devices.energy, devices.focus
filters, temperatures = devices.filters, devices.temperatures
