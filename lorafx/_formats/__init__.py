"""Adapter <-> file, a row a format; `table.py` has the rows, the others the formats."""
