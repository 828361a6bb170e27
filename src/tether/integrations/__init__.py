"""Other libraries, imported here and nowhere else, and only when asked for."""
