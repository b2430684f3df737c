"""What merge.py is made of."""
