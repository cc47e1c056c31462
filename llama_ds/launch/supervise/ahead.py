"""What a restart needs of the hosts, asked for while the ranks of the failed attempt are still being ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from llama_ds.errors import UserError
from llama_ds.launch.preflight import Report
from llama_ds.launch.rendezvous import Rendezvous


class Ahead:
    """A preflight of all hosts, and the rendezvous of those of the failed attempt. Each answer is taken once."""

    def __init__(self, hosts: Sequence[str], examine: Callable[[], Report], arrange: Callable[[], Rendezvous]) -> None:
        """Begin both; `hosts` are those of the rendezvous."""
        self._hosts = list(hosts)
        threads = ThreadPoolExecutor(2)
        self._report: Future[Report] | None = threads.submit(examine)
        self._rendezvous: Future[Rendezvous] | None = threads.submit(arrange)
        threads.shutdown(wait=False)

    def report(self) -> Report | None:
        """Wait for the report of the preflight.

        Raises:
            UserError: as the preflight itself.
        """
        report, self._report = self._report, None
        return report.result() if report else None

    def rendezvous(self, hosts: Sequence[str]) -> Rendezvous | None:
        """Wait for the rendezvous; None if the hosts are others now, or a host that it needs did not answer."""
        found, self._rendezvous = self._rendezvous, None
        if not found or list(hosts) != self._hosts:
            return None
        try:
            return found.result()
        except UserError:
            return None
