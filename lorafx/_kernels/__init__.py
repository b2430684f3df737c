"""The branch's mathematics on tensors: forward, backward and merged."""
