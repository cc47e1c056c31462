"""Run files, their resolution and the arithmetic of a layout. Text and integers only: no torch, no ranks."""
