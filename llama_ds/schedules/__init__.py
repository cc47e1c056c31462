"""Pipeline schedules as plain lists of instructions: built, proven, timed. No torch, no ranks of a running job."""
