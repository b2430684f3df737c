"""What facts.py is made of."""
