"""One rank of a run of any size in a single process: fake process group, fake tensors, and a ledger of both."""
