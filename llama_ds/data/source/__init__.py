"""What a source is, where its files are, and how its rows are read."""
