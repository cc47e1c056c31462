"""Boards: programs that show the metrics of a run beside metrics.jsonl, behind one protocol (`background.Board`)."""
