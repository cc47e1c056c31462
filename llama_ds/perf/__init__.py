"""What a run costs: measurements of steps, and models of time and memory."""
