"""Recognises a failure that comes again at once in the same place: a restart from the same checkpoint does not help."""

from __future__ import annotations

import re

from llama_ds.launch.supervise.attempt import FAILURE, LAUNCHER, Outcome

# Errors of communication follow from another rank's or the network's failure, and may pass.
_MAY_PASS = re.compile(r"Dist\w*Error|[Cc]onnection|ssh: |No route|[Uu]nreachable|[Tt]ime-?d? ?out|NCCL|[Gg]loo")
_VARYING = re.compile(r"0x[0-9a-fA-F]+|\d+")  # addresses, process ids, ports, numbers of attempts and ranks


class RepeatedFailures:
    """Compares each failed attempt with the one before."""

    def __init__(self) -> None:
        self._last: tuple[str, int, str] | None = None  # kind, step, message
        self._hosts: list[str] = []  # the hosts that failed first then

    def seen(self, outcome: Outcome, other_hosts: bool) -> bool:
        """Return whether an attempt failed as the one before it: at the same step with the same message.

        With `other_hosts` to use, a failure of the same host twice may be that host's, so it does not count.
        """
        message = _message(outcome)
        place = (outcome.kind, outcome.step, _VARYING.sub("#", message)) if message else None
        again = place is not None and place == self._last
        same_host = outcome.hosts == self._hosts != []
        self._last, self._hosts = place, list(outcome.hosts)
        return again and not (other_hosts and same_host)


def reason(outcome: Outcome) -> str:
    """Return the last line of what failed."""
    return outcome.text.rstrip().rpartition("\n")[2].strip()


def _message(outcome: Outcome) -> str:
    """Return what identifies a failure, "" for one that may pass or says nothing of its cause."""
    if outcome.kind not in (FAILURE, LAUNCHER):
        return ""
    text = reason(outcome) if outcome.kind == FAILURE else outcome.text
    return "" if _MAY_PASS.search(text) else text
