"""Pipeline schedules timed against each other on real ranks, on links of a given bandwidth."""
