"""Starting ranks: the hostfile's grammar and what a launcher was given. Text and processes only: no tensors."""
