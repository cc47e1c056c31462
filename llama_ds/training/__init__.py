"""The training of a run: its plan, the loop, schedules, meters and monitors."""
