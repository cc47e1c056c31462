"""Names of hosts, and the lists of them that Slurm, LSF and PBS write."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from math import prod

from llama_ds.errors import UserError

MAX_HOSTS = 65_536  # of a list: n[1-9999999999] is a slip of the keyboard, not a cluster
SYSTEMS = ("slurm", "lsf", "pbs")

# 253: the longest name of the DNS.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,252}")
_LITERAL = re.compile(r"[A-Za-z0-9._-]+")
_SPAN = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")
_SPACE = re.compile(r"[ \t\n]*")
_TASKS = re.compile(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?")
_COUNT = re.compile(r"[0-9]{1,6}")
# A number that may vary from host to host. Of longer ones `expand` knows nothing.
_NUMBER = re.compile(r"(?<![0-9])([0-9]{1,18})(?![0-9])")


def check_host(name: str, place: str) -> None:
    """Raise UserError unless `name` is a host's name and nothing else to ssh, pdsh, DeepSpeed's filters and a shell."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{place}: {clip(name)} is not a host name; "
            "use letters, digits, '.', '_' and '-', at most 253, the first a letter, a digit or '_'"
        )


def clip(text: str) -> str:
    """Return what a user gave in quotes, on one line, its end left out where it is long."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def expand(text: str, place: str = "host list") -> list[str]:
    """Return the hosts of a list in Slurm's grammar, such as `a,b[1-3,7],c[01-12]-ib[0-1]`, in its order.

    A range keeps the zero padding of its first number; the last of several brackets varies first.

    Raises:
        UserError: another grammar, with the position; a host twice; more than `MAX_HOSTS` hosts.
    """
    names: list[str] = []
    for at, parts in _items(text, place):
        count = len(names) + prod(map(_size, parts))  # before the names are made
        if count > MAX_HOSTS:
            raise _error(text, at, place, f"there are more than {MAX_HOSTS} hosts; check the range")
        texts = [_texts(part) for part in parts]
        check_host("".join(words[0] for words in texts), f"{place}: position {at + 1}")
        names += map("".join, product(*texts))
    check_distinct(names, place)
    return names


def check_distinct(names: Sequence[str], place: str) -> None:
    """Raise UserError if a host stands twice among `names`."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{place}: host {name} is listed twice; name every host once")
        seen.add(name)


def compress(hosts: Iterable[str]) -> str:
    """Return the hosts as the short list which `expand` turns into the same hosts in the same order."""
    items = list(hosts)
    while len(folded := _folded(items)) < len(items):  # a bracket a turn, from the right
        items = folded
    return ",".join(items)


def from_slurm(nodelist: str, tasks_per_node: str) -> dict[str, int]:
    """Return the slots of each host from SLURM_JOB_NODELIST and SLURM_TASKS_PER_NODE, such as `8(x4),4`."""
    hosts = expand(nodelist, "SLURM_JOB_NODELIST")
    counts: list[int] = []
    for item in tasks_per_node.split(","):
        match = _TASKS.fullmatch(item.strip())
        if not match or int(match[1]) == 0:
            raise UserError(
                f"SLURM_TASKS_PER_NODE: {clip(item)} is not a number of tasks; write it as in 8(x4),4, or give --slots"
            )
        repeats = int(match[2] or 1)
        if len(counts) + repeats > len(hosts):  # before the list is made: it may be large
            raise _unequal(f"more than {len(hosts)}", len(hosts))
        counts += [int(match[1])] * repeats
    if len(counts) != len(hosts):
        raise _unequal(str(len(counts)), len(hosts))
    return dict(zip(hosts, counts, strict=True))


def from_lsf(text: str, place: str = "LSB_HOSTS") -> dict[str, int]:
    """Return the slots of each host, in the order of their first places, from what LSF or PBS says of a job.

    `host1 8 host2 8` (LSB_MCPU_HOSTS), or a host for every slot: `host1 host1 host2 host2` (LSB_HOSTS), one per line
    (the files LSB_DJOB_HOSTFILE and PBS_NODEFILE).
    """
    words = text.split()
    counted = len(words) % 2 == 0 and all(_COUNT.fullmatch(word) for word in words[1::2])
    pairs = zip(words[::2], map(int, words[1::2]), strict=True) if counted else ((word, 1) for word in words)
    slots: dict[str, int] = {}
    for host, count in pairs:
        check_host(host, place)
        if count == 0:
            raise UserError(f"{place}: host {host} has 0 slots; give its number of devices or take it out")
        slots[host] = slots.get(host, 0) + count
    if not slots:
        raise UserError(f"{place}: lists no host; give 'host1 8 host2 8', or a host for every slot")
    return slots


def from_scheduler(system: str, given: str, slots: int | None, environment: Mapping[str, str]) -> dict[str, int]:
    """Return the slots of each host of a job of one of `SYSTEMS`.

    given: Slurm's nodelist, the file of LSF or PBS; "" to look in the job's environment.
    slots: of every host, instead of what the batch system counts, which may be cores.
    """
    if system == "slurm":
        return _slurm_job(given, slots, environment)
    if given:
        hosts = from_lsf(_read(given), given)
    elif system == "pbs":
        path = _variable(environment, "PBS_NODEFILE", "--pbs FILE")
        hosts = from_lsf(_read(path), path)
    else:
        hosts = _lsf_job(environment)
    return hosts if slots is None else dict.fromkeys(hosts, slots)


def _slurm_job(given: str, slots: int | None, environment: Mapping[str, str]) -> dict[str, int]:
    nodelist = given or _variable(environment, "SLURM_JOB_NODELIST", "--slurm NODELIST")
    if slots is not None:
        return dict.fromkeys(expand(nodelist, "--slurm" if given else "SLURM_JOB_NODELIST"), slots)
    if given:
        raise UserError(f"command line: --slurm {clip(given)} does not say how many slots a host has; add --slots 8")
    return from_slurm(nodelist, _variable(environment, "SLURM_TASKS_PER_NODE", "--slots"))


def _lsf_job(environment: Mapping[str, str]) -> dict[str, int]:
    for name in ("LSB_MCPU_HOSTS", "LSB_HOSTS"):
        if environment.get(name):
            return from_lsf(environment[name], name)
    path = _variable(environment, "LSB_DJOB_HOSTFILE", "--lsf FILE")
    return from_lsf(_read(path), path)


def _variable(environment: Mapping[str, str], name: str, instead: str) -> str:
    if not environment.get(name):
        raise UserError(f"environment: {name} is not set, as it is within a job; run this in one, or give {instead}")
    return environment[name]


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{path}: the host list cannot be read: {reason}; give the batch system's file") from None


def _unequal(counts: str, hosts: int) -> UserError:
    return UserError(
        f"SLURM_TASKS_PER_NODE: counts the tasks of {counts} hosts, SLURM_JOB_NODELIST names {hosts}; give --slots"
    )


# Of an item such as c[01-12]-ib[0-1], each part is a literal text, or the ranges of a bracket with their widths.
_Part = str | list[tuple[range, int]]


def _size(part: _Part) -> int:
    return 1 if isinstance(part, str) else sum(len(numbers) for numbers, _ in part)


def _texts(part: _Part) -> list[str]:
    if isinstance(part, str):
        return [part]
    return [str(number).zfill(width) for numbers, width in part for number in numbers]


def _items(text: str, place: str) -> Iterator[tuple[int, list[_Part]]]:
    """Yield the position and the parts of each item between commas."""
    at = -1
    while at < len(text):
        start = _skip(text, at + 1)
        parts, at = _item(text, start, place)
        at = _skip(text, at)
        if at < len(text) and text[at] != ",":
            raise _error(text, at, place, f"{text[at]!r} is in no host list; write it as in node[001-256],login1")
        if not parts:
            raise _error(text, at, place, "a host name is missing; write names with one comma between")
        yield start, parts


def _item(text: str, at: int, place: str) -> tuple[list[_Part], int]:
    """Return the parts of the item that begins at `at`, and the position after it."""
    parts: list[_Part] = []
    while at < len(text):
        part: _Part
        if text[at] == "[":
            part, at = _bracket(text, at, place)
        elif literal := _LITERAL.match(text, at):
            part, at = literal[0], literal.end()
        else:
            break
        parts.append(part)
    return parts, at


def _bracket(text: str, at: int, place: str) -> tuple[list[tuple[range, int]], int]:
    """Return the ranges of the bracket that opens at `at`, and the position after it."""
    end = text.find("]", at)
    if end < 0:
        raise _error(text, at, place, "the bracket is not closed; write it as in node[001-256]")
    ranges = []
    at += 1
    for item in text[at:end].split(","):
        match = _SPAN.fullmatch(item)
        if not match:
            raise _error(text, at, place, f"{clip(item)} is not a number or a range; write it as in [001-004,7]")
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first):
            raise _error(text, at, place, f"the range {item} runs backwards; write {last}-{first}")
        if last[0] == "0" and len(last) != len(first):
            raise _error(text, at, place, f"the range {item} pads its ends differently; give both as many digits")
        ranges.append((range(int(first), int(last) + 1), len(first)))
        at += len(item) + 1
    return ranges, end + 1


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _error(text: str, at: int, place: str, what: str) -> UserError:
    return UserError(f"{place}: {clip(text)}, position {at + 1}: {what}")


def _folded(items: Sequence[str]) -> list[str]:
    """Return the items with neighbours that differ in one number joined, a number left of all brackets."""
    folded: list[str] = []
    group: list[list[str]] = []
    varying: int | None = None
    for tokens in map(_tokens, items):
        index = _difference(group[-1], tokens) if group else None
        if index is not None and varying in (None, index):
            varying = index
        elif group:
            folded.append(_joined(group, varying))
            group, varying = [], None
        group.append(tokens)
    return [*folded, _joined(group, varying)] if group else folded


def _tokens(item: str) -> list[str]:
    """Split an item into literals, at even places, and numbers; its brackets are part of the last literal."""
    head, bracket, tail = item.partition("[")
    *tokens, last = _NUMBER.split(head)
    return [*tokens, last + bracket + tail]


def _difference(a: Sequence[str], b: Sequence[str]) -> int | None:
    """Return the place of the number in which alone two items differ."""
    if len(a) != len(b):
        return None
    places = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    return places[0] if len(places) == 1 and places[0] % 2 else None


def _joined(group: Sequence[Sequence[str]], varying: int | None) -> str:
    if varying is None:
        return "".join(group[0])
    spans: list[list[str]] = []
    for number in (tokens[varying] for tokens in group):
        if spans and number == str(int(spans[-1][-1]) + 1).zfill(len(spans[-1][0])):
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    numbers = ",".join("-".join(span) for span in spans)
    return "".join([*group[0][:varying], f"[{numbers}]", *group[0][varying + 1 :]])
