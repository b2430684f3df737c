"""A base checkpoint on a disk: found, planned, folded and written."""
