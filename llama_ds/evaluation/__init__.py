"""Benchmarks of a model: requests to log-likelihoods on the trained layers, tasks made of requests, their results."""
