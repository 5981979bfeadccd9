"""Linear layers over weights that are laid out once for the device."""
