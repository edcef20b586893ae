"""The digital twin: physics in the laboratory frame and the IOC that serves it."""
