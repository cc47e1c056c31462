"""Watching over a job: its ranks' beats, its end on all hosts, what went wrong, and starting it again."""
