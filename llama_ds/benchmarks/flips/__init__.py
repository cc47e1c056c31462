"""Random bit flips in a small run: which of them its checks find."""
