"""What decode.py is made of."""
