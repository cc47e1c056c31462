"""What ranks and the launcher share: the job's folder, the heartbeat and the wire format. Does not import torch."""
