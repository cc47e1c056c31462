"""Supervision of a job: heartbeats of its ranks, cleanup on all hosts, diagnosis of failures, and restarts."""
