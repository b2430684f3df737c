"""What sharded.py is made of."""
