"""Other libraries and real models; each module needs an extra."""
