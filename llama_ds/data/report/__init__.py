"""Reports on built sources: documents, lengths, duplicates, bytes per token, sample rows."""
