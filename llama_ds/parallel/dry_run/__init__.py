"""One rank of a run of any size in one process: a fake process group, tensors without data, a ledger of both."""
