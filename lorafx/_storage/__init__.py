"""Bytes on a disk: safetensors, what torch.save writes, and writes that are whole or not at all."""
