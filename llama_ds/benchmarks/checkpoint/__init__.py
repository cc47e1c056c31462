"""Checkpoint benchmark: saving, loading, resharding and converting, against the raw disk and other libraries."""
