"""Attention over rows that context-parallel ranks share, by each method, on links of a given bandwidth."""
