"""Where copies of a rank's state go, so that the loss of a host, or of a pipeline, leaves one of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llama_ds.layout.axes import Axes


def peer_ranks(axes: Axes, hosts: Sequence[str]) -> list[int] | None:
    """Return for each rank the rank whose host keeps a copy of its state; None if all ranks are on one host.

    Peers are on other hosts. If one shift along pp and the data axes achieves this for all ranks, every rank also keeps
    one copy only, and a peer belongs to another pipeline and to another data-parallel group, as far as the sizes of the
    axes allow.

    Args:
        axes: sizes of the axes of the job.
        hosts: the host of every rank.
    """
    if len(set(hosts)) == 1:
        return None
    for shift in _shifts(axes):
        peers = [_shifted(axes, rank, shift) for rank in range(axes.world)]
        if all(hosts[rank] != hosts[peer] for rank, peer in enumerate(peers)):
            return peers
    found = []
    for rank, host in enumerate(hosts):  # hosts of unequal numbers of ranks
        others = [other for other in range(axes.world) if hosts[other] != host]
        found.append(others[rank % len(others)])
    return found


def _shifts(axes: Axes) -> Iterator[tuple[int, int]]:
    """Yield shifts along pp and the data axis, those along both first."""
    pp, data = range(axes.pp), range(axes.data_axis)
    every = [(stage, replica) for stage in pp for replica in data if stage or replica]
    yield from sorted(every, key=lambda shift: ((shift[0] == 0) + (shift[1] == 0), shift))


def _shifted(axes: Axes, rank: int, shift: tuple[int, int]) -> int:
    stage, within = divmod(rank, axes.stride("pp"))
    place, tp_rank = axes.stage_places[within]
    moved = (place + shift[1]) % axes.data_axis
    return ((stage + shift[0]) % axes.pp) * axes.stride("pp") + moved * axes.tp + tp_rank
