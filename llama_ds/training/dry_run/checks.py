"""Consistency checks between ranks: pure arithmetic on their reports."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from llama_ds.config.schema import RunConfig
from llama_ds.errors import first_of
from llama_ds.layout.flops import parameter_count
from llama_ds.layout.layout import Layout
from llama_ds.layout.weights import padding_elements
from llama_ds.parallel.dry_run.ledger import UNEVEN
from llama_ds.training.dry_run.report import Check, IssuedCall, ProcessGroup, RankReport

MESSAGES = ("send", "receive")
_MOST_NAMED = 8
Channel = tuple[ProcessGroup, int, int]  # group, sending rank, receiving rank


def check_ranks(run: RunConfig, layout: Layout, reports: Sequence[RankReport]) -> list[Check]:
    """Run all checks on the reports of the simulated ranks."""
    return [
        check_groups(reports),
        check_messages(reports),
        check_collectives(reports),
        check_progress(reports),
        check_batch(layout, reports),
        check_parameters(run, layout, reports),
    ]


def check_groups(reports: Sequence[RankReport]) -> Check:
    """All ranks create the same process groups in the same order: creating a group blocks until all ranks do."""
    name, first = "process groups", reports[0]
    for report in reports[1:]:
        if report.new_groups != first.new_groups:
            return Check(
                name,
                False,
                f"ranks {first.rank} and {report.rank} create different groups, or in a different order",
            )
    members: dict[str, tuple[int, tuple[int, ...]]] = {}
    for report in reports:
        for group in report.groups:
            rank, ranks = members.setdefault(group.name, (report.rank, group.ranks))
            if ranks != group.ranks:
                before, own = first_of(ranks, _MOST_NAMED), first_of(group.ranks, _MOST_NAMED)
                text = f"group {group.name} is {before} on rank {rank}, {own} on rank {report.rank}"
                return Check(name, False, text)
    return Check(name, True, f"created in the same order on {len(reports)} ranks, {len(members)} in use")


def check_messages(reports: Sequence[RankReport]) -> Check:
    """Every send has a matching receive on the target rank: same order, same size, same group."""
    known = {report.rank for report in reports}
    sent: dict[Channel, list[int]] = defaultdict(list)
    received: dict[Channel, list[int]] = defaultdict(list)
    outside = 0
    for report in reports:
        for call in _all(report):
            if call.kind not in MESSAGES:
                continue
            group = report.groups[call.group]
            if call.peer not in known:
                outside += 1
            elif call.kind == "send":
                sent[group, report.rank, call.peer].append(call.bytes)
            else:
                received[group, call.peer, report.rank].append(call.bytes)
    for channel in sorted(sent.keys() | received.keys()):
        (group, source, target), there, here = channel, sent[channel], received[channel]
        for n, (out, into) in enumerate(zip_longest(there, here), start=1):
            if out != into:
                return Check(
                    "messages", False, f"group {group.name}, rank {source} to rank {target}, {len(there)} sends and "
                    f"{len(here)} receives: message {n}: {_size(out)} sent, {_size(into)} received",
                )  # fmt: skip
    rest = f"; {outside} to or from ranks that were not run" if outside else ""
    return Check("messages", True, f"{sum(map(len, sent.values()))} sends match their receives{rest}")


def check_collectives(reports: Sequence[RankReport]) -> Check:
    """All members of a group issue the same collectives on it, in the same order."""
    issued: dict[ProcessGroup, dict[int, list[IssuedCall]]] = defaultdict(dict)
    for report in reports:
        for index, group in enumerate(report.groups):
            own = [call for call in _all(report) if call.group == index and call.kind not in MESSAGES]
            issued[group][report.rank] = own
    compared = 0
    for group, by_rank in sorted(issued.items()):
        first, *others = sorted(by_rank)
        for rank in others:
            for n, (ours, theirs) in enumerate(zip_longest(by_rank[first], by_rank[rank]), start=1):
                if ours is None or theirs is None or _common(ours) != _common(theirs):
                    text = f"group {group.name} of ranks {first_of(group.ranks, _MOST_NAMED)}: collective {n} is "
                    text += f"{_call(ours)} on rank {first}, {_call(theirs)} on rank {rank}"
                    return Check("collectives", False, text)
            compared += len(by_rank[rank])
    shared = sum(len(by_rank) > 1 for by_rank in issued.values())
    return Check(
        "collectives", True, f"{compared} match those of other members, in {shared} groups run on two or more ranks"
    )


def _common(call: IssuedCall) -> IssuedCall:
    """Return what must be the same on all members: not the number of their group, nor sizes that each states itself."""
    return call._replace(group=0, bytes=0 if call.kind == UNEVEN else call.bytes)


def check_progress(reports: Sequence[RankReport]) -> Check:
    """All ranks finish if each collective blocks until every simulated member of its group has issued it."""
    rest: dict[int, deque[tuple[ProcessGroup, str]]] = {
        report.rank: deque((report.groups[c.group], c.kind) for c in _all(report) if c.kind not in MESSAGES)
        for report in reports
    }
    members = {group: [rank for rank in rest if rank in group.ranks] for r in reports for group in r.groups}
    total = sum(map(len, rest.values()))
    ready = deque(rest)
    waiting: dict[ProcessGroup, set[int]] = defaultdict(set)
    while ready:
        rank = ready.popleft()
        if not rest[rank]:
            continue
        group = rest[rank][0][0]
        waiting[group].add(rank)
        if len(waiting[group]) == len(members[group]):
            for member in members[group]:
                rest[member].popleft()
            ready.extend(waiting.pop(group))
    stuck = {rank: calls[0] for rank, calls in rest.items() if calls}
    if stuck:
        heads = "; ".join(
            f"rank {rank} in {kind} of group {group.name} ({first_of(group.ranks, _MOST_NAMED)})"
            for rank, (group, kind) in sorted(stuck.items())[:4]
        )
        return Check("no deadlock", False, f"{len(stuck)} ranks wait for one another: {heads}")
    return Check("no deadlock", True, f"{total} collectives of {len(rest)} ranks complete, one at a time")


def check_batch(layout: Layout, reports: Sequence[RankReport]) -> Check:
    """The micro-batches of the ranks that read data make up the global batch; DeepSpeed computes the same sizes."""
    name = "batch"
    for report in reports:
        wanted = layout.accumulation if report.reads_data else 0
        if report.micro_batches != wanted:
            return Check(name, False, f"rank {report.rank} reads {report.micro_batches} micro-batches, not {wanted}")
        # To DeepSpeed dp and cp are one data axis, each of whose ranks has rows of its own.
        sizes = layout.global_batch * layout.cp, layout.accumulation, layout.data_axis
        if report.engine_batch != sizes:
            return Check(
                name, False, f"rank {report.rank}: DeepSpeed's engine has (batch, accumulation, data-parallel ranks) = "
                f"{report.engine_batch}, the layout {sizes}",
            )  # fmt: skip
    text = f"dp {layout.dp} x micro batch {layout.micro_batch} x {layout.accumulation} micro-batches"
    rows = layout.dp * layout.micro_batch * layout.accumulation
    return Check(name, rows == layout.global_batch, f"{text} = {rows} rows, global batch {layout.global_batch}")


def check_parameters(run: RunConfig, layout: Layout, reports: Sequence[RankReport]) -> Check:
    """The stages' parameters add up to the model's: tensor-parallel shards count tp times, the others once."""
    name = "parameters"
    by_position: dict[int, tuple[int, int]] = {}
    for report in reports:
        own = report.parameters_sharded, report.parameters_replicated
        if by_position.setdefault(report.coords.pp, own) != own:
            return Check(
                name, False, f"rank {report.rank} holds {report.parameters} parameters, unlike others of its stage"
            )
    if len(by_position) < layout.pp:
        return Check(name, True, f"equal on ranks of a stage; {layout.pp - len(by_position)} stages were not run")
    total = sum(sharded * layout.tp + replicated for sharded, replicated in by_position.values())
    model, padding = parameter_count(run.model), padding_elements(run.model, layout.tp)
    padded = f" and {padding:,} of padding" if padding else ""
    return Check(name, total == model + padding, f"all stages hold {total:,}, the model has {model:,}{padded}")


def _all(report: RankReport) -> Iterable[IssuedCall]:
    yield from report.building
    yield from report.step


def _size(size: int | None) -> str:
    return "none" if size is None else f"{size} bytes"


def _call(call: IssuedCall | None) -> str:
    if call is None:
        return "none"
    return f"{call.kind} of {call.bytes} bytes" + (f" with root {call.peer}" if call.peer >= 0 else "")
