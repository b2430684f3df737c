"""The version of lorafx; the command line says it without the library, and so without torch."""

__version__ = "0.1.0"
