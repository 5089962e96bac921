"""A regular package, since torch-fidelity installs one of this name into site-packages."""
