"""What step.py is made of."""
