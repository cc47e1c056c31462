"""Exposed tensor-parallel communication of decoder layers, with their tokens in chunks and whole."""
