"""The planner: what a step costs in time and memory on hardware that need not be there, and which layout is best."""
