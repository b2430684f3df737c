"""What stream.py is made of."""
