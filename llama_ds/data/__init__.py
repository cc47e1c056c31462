"""Data: text files -> tokens -> packed rows in tar shards -> a seeded order -> micro-batches."""
