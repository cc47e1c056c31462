"""Training: the plan of a run, the loop, engines, learning rate, metrics and monitors."""
