"""Finished and running runs side by side: their records, and a report on them."""
