"""Kinds of recorded events (compute, communication, waits), and the metrics derived from them."""

from __future__ import annotations

COMPUTE = ("F", "BW", "B", "W")
RECOMPUTE = "recompute"

COMMUNICATION = {
    "p2p": "activations and gradients between pipeline stages",
    "tp": "tensor parallelism: all-gathers and reductions between the shards of a matrix",
    "cp": "context parallelism: keys and values around a ring, or all-to-alls",
    "reduction": "gradients over data-parallel ranks",
    "weights": "all-gathers of weights",
    "matrices": "Muon's matrices on their way to their owners, and their updates on the way back",
    "agreement": "the norm and the loss over all ranks",
}
WAITS = {  # blocking waits, by kind of communication
    "wait activation": "p2p",
    "wait grad": "p2p",
    "send activation": "p2p",
    "send grad": "p2p",
    "wait sends": "p2p",
    "wait tp": "tp",
    "wait cp": "cp",
    "wait reduction": "reduction",
    "wait tied": "reduction",
    "wait weights": "weights",
    "wait matrices": "matrices",
    "wait norm": "agreement",  # all ranks of a step take part, so the last one to arrive is known
    "wait agreement": "agreement",
}
# Intervals from issue to completion, by kind of communication.
IN_FLIGHT = {
    "tp": "tp",
    "cp": "cp",
    "reduce": "reduction",
    "gather": "weights",
    "matrices": "matrices",
    "agree": "agreement",
}
UPDATES = ("optimizer", "orthogonalise")  # the latter are Muon's matrices, which may be in a rank's waits
MESSAGES = ("wait activation", "wait grad")
SENDS = ("send activation", "send grad")

METRICS = {  # all in percent
    "compute": "of all ranks' time: forward and backward",
    "recompute": "of all ranks' time: recompute of layers for their backward (policy full)",
    "optimizer": "of all ranks' time",
    "data": "of all ranks' time: waiting for a micro-batch",
    "bubble": "of all ranks' time: waiting for another rank that still computes",
    "exposed": "of all ranks' time: waiting for communication of any kind",
    **{f"exposed_{kind}": f"of all ranks' time: waiting for {text}" for kind, text in COMMUNICATION.items()},
    "other": "of all ranks' time: the rest of a step",
    **{f"hidden_{kind}": f"of its time in flight that overlaps other work: {kind}" for kind in COMMUNICATION},
    "ideal_bubble": "of the schedule's time: its bubble with equal stages and free messages",
    "lost_schedule": "of the step: that bubble",
    "lost_imbalance": "of the step: additional bubble with the stages' measured times",
    "lost_messages": "of the step: additional bubble with the messages' measured times",
    "lost_rest": "of the step: the rest of bubble and exposed_p2p, from variation and other waits",
    "imbalance": "excess compute time of the slowest stage over the mean stage",
    "slowest": "excess compute time of the slowest rank over the median of its stage",
    "gemm": "rate of matrix products, of the device's peak, or of the best product's rate if the peak is unknown",
    "exposed_kernels": "of the time from the first kernel to the last: communication kernels alone (CUDA)",
    "idle_kernels": "of the time from the first kernel to the last: no kernel at all (CUDA)",
}
