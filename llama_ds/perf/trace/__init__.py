"""Recorded steps: what ranks did and when, read, analysed, merged and drawn."""
