"""Benchmarks pipeline schedules against each other on real ranks and links of a given bandwidth."""
