"""Data sources: manifests, local and remote stores, and reading of rows."""
