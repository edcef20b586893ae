"""Documents and files to scans and back: Tiled, the document log, CXI."""
