"""Host names, and the host lists of Slurm, LSF and PBS."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from math import prod

from llama_ds.errors import UserError

MAX_HOSTS = 65_536  # limit of one list; a larger range such as n[1-9999999999] is a typing error
SYSTEMS = ("slurm", "lsf", "pbs")

# The DNS allows names of at most 253 characters.
_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_LITERAL = re.compile(r"[A-Za-z0-9._-]+")
_SPAN = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")
_SPACE = re.compile(r"[ \t\n]*")
_TASKS = re.compile(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?")
_COUNT = re.compile(r"[0-9]{1,6}")
# A number that may vary from host to host. `expand` does not accept longer ones.
_NUMBER = re.compile(r"(?<![0-9])([0-9]{1,18})(?![0-9])")


def check_host(name: str, source: str) -> None:
    """Raise UserError unless `name` is a host name that ssh, pdsh, DeepSpeed's filters and a shell take literally.

    All lists of hosts have this one grammar. pdsh reads - ^ / [ ] @ : in a name, filters @ and :, ssh a leading -.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{source}: {clip(name)} is not a host name; "
            "use letters, digits, '.', '_' and '-', at most 253, the first and last a letter, a digit or '_'; "
            "an IPv6 address, a port or a user belongs to a name in ssh's config (Host NAME, HostName, Port, User)"
        )


def clip(text: str) -> str:
    """Return a user's text quoted on one line, truncated if long."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def expand(text: str, source: str = "host list") -> list[str]:
    """Return the hosts of a list in Slurm's syntax, such as `a,b[1-3,7],c[01-12]-ib[0-1]`, in order.

    A range keeps the zero padding of its first number; the last of several brackets varies first.

    Raises:
        UserError: The syntax is wrong (with the position), a host appears twice, or there are over `MAX_HOSTS` hosts.
    """
    names: list[str] = []
    for at, parts in _items(text, source):
        count = len(names) + prod(map(_size, parts))  # checked before the names are built
        if count > MAX_HOSTS:
            raise _error(text, at, source, f"there are more than {MAX_HOSTS} hosts; check the range")
        texts = [_texts(part) for part in parts]
        check_host("".join(words[0] for words in texts), f"{source}: position {at + 1}")
        names += map("".join, product(*texts))
    check_distinct(names, source)
    return names


def check_distinct(names: Sequence[str], source: str) -> None:
    """Raise UserError if a host appears twice in `names`."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{source}: host {name} is listed twice; name every host once")
        seen.add(name)


def compress(hosts: Iterable[str]) -> str:
    """Return the shortest list that `expand` turns back into the same hosts in the same order."""
    items = list(hosts)
    while len(folded := _folded(items)) < len(items):  # each pass adds one bracket, from the right
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
        if len(counts) + repeats > len(hosts):  # checked before the list is built; it may be large
            raise _unequal(f"more than {len(hosts)}", len(hosts))
        counts += [int(match[1])] * repeats
    if len(counts) != len(hosts):
        raise _unequal(str(len(counts)), len(hosts))
    return dict(zip(hosts, counts, strict=True))


def from_lsf(text: str, source: str = "LSB_HOSTS") -> dict[str, int]:
    """Return the slots of each host from the host list of LSF or PBS, in order of first appearance.

    The list is `host1 8 host2 8` (LSB_MCPU_HOSTS), or has a host for every slot: `host1 host1 host2 host2` (LSB_HOSTS),
    one per line in the files LSB_DJOB_HOSTFILE and PBS_NODEFILE.
    """
    words = text.split()
    counted = len(words) % 2 == 0 and all(_COUNT.fullmatch(word) for word in words[1::2])
    pairs = zip(words[::2], map(int, words[1::2]), strict=True) if counted else ((word, 1) for word in words)
    slots: dict[str, int] = {}
    for host, count in pairs:
        check_host(host, source)
        if count == 0:
            raise UserError(f"{source}: host {host} has 0 slots; give its number of devices or take it out")
        slots[host] = slots.get(host, 0) + count
    if not slots:
        raise UserError(f"{source}: lists no host; give 'host1 8 host2 8', or a host for every slot")
    return slots


def from_scheduler(system: str, given: str, slots: int | None, environment: Mapping[str, str]) -> dict[str, int]:
    """Return the slots of each host of a batch job.

    Args:
        system: one of `SYSTEMS`.
        given: Slurm's node list, or the file of LSF or PBS; "" reads the job's environment.
        slots: slots of every host; None takes the batch system's count, which may count cores.
        environment: environment variables of the job.
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


# A part of an item such as c[01-12]-ib[0-1]: a literal text, or the ranges of a bracket with their widths.
_Part = str | list[tuple[range, int]]


def _size(part: _Part) -> int:
    return 1 if isinstance(part, str) else sum(len(numbers) for numbers, _ in part)


def _texts(part: _Part) -> list[str]:
    if isinstance(part, str):
        return [part]
    return [str(number).zfill(width) for numbers, width in part for number in numbers]


def _items(text: str, source: str) -> Iterator[tuple[int, list[_Part]]]:
    """Yield the position and the parts of each item between commas."""
    at = -1
    while at < len(text):
        start = _skip(text, at + 1)
        parts, at = _item(text, start, source)
        at = _skip(text, at)
        if at < len(text) and text[at] != ",":
            raise _error(text, at, source, f"{text[at]!r} is in no host list; write it as in node[001-256],login1")
        if not parts:
            raise _error(text, at, source, "a host name is missing; write names with one comma between")
        yield start, parts


def _item(text: str, at: int, source: str) -> tuple[list[_Part], int]:
    """Return the parts of the item that begins at `at`, and the position after it."""
    parts: list[_Part] = []
    while at < len(text):
        part: _Part
        if text[at] == "[":
            part, at = _bracket(text, at, source)
        elif literal := _LITERAL.match(text, at):
            part, at = literal[0], literal.end()
        else:
            break
        parts.append(part)
    return parts, at


def _bracket(text: str, at: int, source: str) -> tuple[list[tuple[range, int]], int]:
    """Return the ranges of the bracket that opens at `at`, and the position after it."""
    end = text.find("]", at)
    if end < 0:
        raise _error(text, at, source, "the bracket is not closed; write it as in node[001-256]")
    ranges = []
    at += 1
    for item in text[at:end].split(","):
        match = _SPAN.fullmatch(item)
        if not match:
            raise _error(text, at, source, f"{clip(item)} is not a number or a range; write it as in [001-004,7]")
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first):
            raise _error(text, at, source, f"the range {item} runs backwards; write {last}-{first}")
        if last[0] == "0" and len(last) != len(first):
            raise _error(text, at, source, f"the range {item} pads its ends differently; give both as many digits")
        ranges.append((range(int(first), int(last) + 1), len(first)))
        at += len(item) + 1
    return ranges, end + 1


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _error(text: str, at: int, source: str, what: str) -> UserError:
    return UserError(f"{source}: {clip(text)}, position {at + 1}: {what}")


def _folded(items: Sequence[str]) -> list[str]:
    """Join neighbouring items that differ in exactly one number left of all brackets."""
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
    """Split an item into literals at even positions and numbers at odd ones; the last literal includes the brackets."""
    head, bracket, tail = item.partition("[")
    *tokens, last = _NUMBER.split(head)
    return [*tokens, last + bracket + tail]


def _difference(a: Sequence[str], b: Sequence[str]) -> int | None:
    """Return the index of the only token in which two items differ if it is a number, else None."""
    if len(a) != len(b):
        return None
    differing = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    return differing[0] if len(differing) == 1 and differing[0] % 2 else None


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
