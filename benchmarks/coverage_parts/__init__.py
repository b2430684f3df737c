"""What coverage.py is made of."""
