"""What ranks record, sorted: computing, communication by kind, waiting; and the metrics that come of it."""

from __future__ import annotations

COMPUTE = ("F", "BW", "B", "W")
RECOMPUTE = "recompute"

COMMUNICATION = {
    "p2p": "activations and gradients between pipeline stages",
    "tp": "tensor parallelism: gathers and sums between the parts of a matrix",
    "reduction": "gradients over data-parallel ranks",
    "weights": "gathers of weights",
    "agreement": "the norm and the loss over all ranks",
}
WAITS = {  # a rank does nothing else meanwhile
    "wait activation": "p2p",
    "wait grad": "p2p",
    "send activation": "p2p",
    "send grad": "p2p",
    "wait sends": "p2p",
    "wait tp": "tp",
    "wait reduction": "reduction",
    "wait tied": "reduction",
    "wait weights": "weights",
    "wait norm": "agreement",  # of all ranks of a pipeline's step, so it is known who came last
    "wait agreement": "agreement",
}
UNDER_WAY = {"tp": "tp", "reduce": "reduction", "gather": "weights", "agree": "agreement"}  # from issue to completion
MESSAGES = ("wait activation", "wait grad")
SENDS = ("send activation", "send grad")

METRICS = {  # all in percent
    "compute": "of all ranks' time: forward and backward",
    "recompute": "of all ranks' time: layers run again for their backward (policy full)",
    "optimizer": "of all ranks' time",
    "data": "of all ranks' time: waiting for a micro-batch",
    "bubble": "of all ranks' time: waiting for another rank that is not through with its computation",
    "exposed": "of all ranks' time: waiting for communication of any kind",
    **{f"exposed_{kind}": f"of all ranks' time: waiting for {text}" for kind, text in COMMUNICATION.items()},
    "other": "of all ranks' time: within a step, but none of these",
    **{f"hidden_{kind}": f"of its own time under way that no rank waited for: {kind}" for kind in COMMUNICATION},
    "ideal_bubble": "of the schedule's time: its bubble with equal stages and free messages",
    "lost_schedule": "of the step: that bubble",
    "lost_imbalance": "of the step: what the stages' measured times add to it",
    "lost_messages": "of the step: what the messages' measured times add to that",
    "lost_rest": "of the step: what remains of bubble and exposed_p2p: times that vary, ranks held up by other waits",
    "imbalance": "by which the slowest stage computes longer than the mean stage",
    "slowest": "by which the slowest rank computes longer than the median of its stage",
    "gemm": "of the peak at which matrix products run, or of the best product's rate where no peak is known",
    "exposed_kernels": "of the time from the first kernel to the last: communication kernels alone (CUDA)",
    "idle_kernels": "of the time from the first kernel to the last: no kernel at all (CUDA)",
}
