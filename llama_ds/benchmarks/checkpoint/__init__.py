"""Checkpoints measured: saving, loading, resharding and converting, against the disk and plain libraries."""
