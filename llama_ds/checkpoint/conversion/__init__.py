"""Conversion from one model format to another: a plan is executed, resumable, and verified."""
