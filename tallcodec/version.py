"""The package's version, as written into files."""

__version__ = "0.1.0"
