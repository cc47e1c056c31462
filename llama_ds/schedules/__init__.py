"""Pipeline schedules as plain lists of instructions: built, verified and simulated without torch or running ranks."""
