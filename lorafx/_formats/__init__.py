"""Adapter <-> file, a row a format."""
