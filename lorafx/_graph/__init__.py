"""Reads Python and fx graphs: what can be traced, which calls are linear, which sites are meant."""
