"""Building a source: from documents to shards."""
