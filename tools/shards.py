#!/usr/bin/env python3
"""Gather a local corpus; build, verify and inspect webdataset shards of packed rows."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_ds.command_line import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from llama_ds import log, shipped
from llama_ds.command_line import Answer, add_json, new_parser, processes, real, run, size, subcommands, whole
from llama_ds.config.text import save_text
from llama_ds.data.building.build import build_source
from llama_ds.data.building.found_input import FoundInput, find_input
from llama_ds.data.building.workers import WorkerPool
from llama_ds.data.building.workers import workers as start_workers
from llama_ds.data.source.listing import as_data, as_line, epochs, find_sources
from llama_ds.data.source.manifest import MANIFEST
from llama_ds.data.text.formats import ReadOptions
from llama_ds.data.text.gather import gather_local_corpus
from llama_ds.data.text.reading_options import add_reading_options, reading_options
from llama_ds.errors import UserError

if TYPE_CHECKING:
    from llama_ds.data.source.store import Store
    from llama_ds.data.source.verify import Damage

CORES = os.cpu_count() or 1
EXAMPLES = """examples:
  tools/shards.py gather --out corpus --limit-mb 32
  tools/shards.py build --source code=corpus/code.jsonl --source prose=corpus/prose.jsonl \\
      --tokenizer corpus/tokenizer.model --seq-len 256 --out corpus/shards
  tools/shards.py build --source web='crawl/*.jsonl.zst' --source books=books.parquet --dedup --skip-bad \\
      --tokenizer corpus/tokenizer.model --seq-len 2048 --out shards --workers 32
  tools/shards.py verify corpus/shards --repair
  tools/shards.py audit runs/quickstart --step 17
  tools/shards.py consumed runs/quickstart
  tools/shards.py info corpus/shards --rows 100000 --weight code=0.7 --weight prose=0.3
  tools/shards.py report corpus/shards --tokenizer corpus/tokenizer.model --html report.html
  tools/shards.py unigram corpus/shards/code=0.7 corpus/shards/prose=0.3
"""

BUILD = """Tokenize and pack texts, JSON, parquet and Arrow files; docs/data.md lists all formats.

The same input and flags give the same bytes with any number of workers. Builds are resumable: after a kill, the same
command continues and does not repeat finished work.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run(parser(), argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(None, __doc__, EXAMPLES)
    add = subcommands(parser)
    command = add("gather", gather, "collect Python sources and prose found on this machine")
    command.add_argument("--out", required=True, metavar="DIR", help="writes DIR/code.jsonl and DIR/prose.jsonl")
    command.add_argument("--limit-mb", type=size, default=32.0, help="total size of text (default: %(default)s)")
    _add_build_options(add("build", build, "tokenize and pack", BUILD))
    command = add("serve", serve, "run the tasks of a build on one of its hosts; `build --hostfile` starts it")
    command.add_argument("--shared", required=True, metavar="FILE", help="a file that the build has written")
    command.add_argument("--cwd", required=True, metavar="DIR", help="working directory of the build")
    command.add_argument("--workers", type=processes, help="processes (default: one for each core)")
    command = add("verify", verify, "check every shard against its checksum and its manifest")
    command.add_argument("dir", help="a source, a folder of sources, or the URL of a source")
    command.add_argument("--repair", action="store_true", help="record exactly the damaged shards in the manifest")
    _add_access_options(command)
    add_json(command, "the damage of each source")
    command = add("audit", audit, "list the documents that a step of a run reads")
    command.add_argument("run", help="the folder of a run, such as runs/quickstart")
    command.add_argument("--step", type=whole(0), required=True, help="counted from 0")
    add_json(command, "its rows")
    command = add("consumed", consumed, "tokens and epochs that a run reads of each source")
    command.add_argument("run", help="the folder of a run")
    command.add_argument("--step", type=whole(0), help="count up to this step (default: the full run)")
    add_json(command, "them")
    command = add("info", info, "rows and tokens of each source")
    command.add_argument("dir", help="a source, or a folder of sources")
    command.add_argument(
        "--rows", type=whole(), metavar="N", help="print the epochs of a run of steps * batch = N rows"
    )
    words = "with --rows: weight of a source (default: proportional to its rows)"
    command.add_argument("--weight", action="append", default=[], metavar="NAME=W", type=_weight, help=words)
    add_json(command, "them")
    command = add("report", report, "documents, tokens, lengths, duplicates, bytes per token and sample rows")
    command.add_argument("dir", help="a source, a folder of sources, or the URL of a source")
    words = "the tokenizer of the build, for bytes per token and sample rows"
    command.add_argument("--tokenizer", metavar="MODEL", help=words)
    words = "rows to show of each source (default: %(default)s)"
    command.add_argument("--samples", type=whole(0, 1000), default=3, help=words)
    command.add_argument("--html", metavar="FILE", help="also write a page with pictures")
    _add_access_options(command)
    add_json(command, "a list of reports")
    command = add("unigram", unigram, "loss of a unigram model on the validation rows, nats per token")
    command.add_argument("sources", nargs="+", metavar="DIR=WEIGHT", type=_weight)
    command.add_argument("--rows", type=whole(), default=64, help="evaluation.rows of the run (default: %(default)s)")
    return parser


def _add_access_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--workers", type=processes, default=CORES, help="threads (default: %(default)s)")
    command.add_argument("--cache-dir", default="", help="for a URL: cache folder for downloaded shards")
    command.add_argument("--cache-gib", type=size, default=8.0, help="size of the cache (default: %(default)s)")


def _add_build_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--source", action="append", required=True, metavar="NAME=PATTERN", type=_assignment,
        help="PATTERN: a file, a folder, or a glob in quotes; may be repeated",
    )  # fmt: skip
    command.add_argument(
        "--tokenizer",
        required=True,
        metavar="FILE",
        help="a sentencepiece model, a tokenizer.json, or Llama 3's tokenizer.model",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="writes DIR/NAME/")
    command.add_argument("--seq-len", type=whole(), required=True, help="labels per row; a row has one more id")
    command.add_argument("--workers", type=processes, help="processes, on each host (default: one for each core)")
    command.add_argument("--hostfile", help="build on its hosts, which share all files and are reached by ssh")
    command.add_argument(
        "--validation-fraction", type=real(0, 1), default=0.01, help="fraction of documents (default: %(default)s)"
    )
    command.add_argument("--rows-per-shard", type=whole(), default=16384, help="(default: %(default)s)")
    command.add_argument(
        "--document-chars", type=whole(0), default=0, help="split longer documents at line ends; 0: never"
    )
    command.add_argument("--dedup", action="store_true", help="drop exact duplicates of documents")
    command.add_argument(
        "--skip-bad", action="store_true", help="skip documents that are empty, not UTF-8, or not JSON"
    )
    command.add_argument(
        "--allow-empty", action="append", default=[], metavar="GLOB", help="files that may yield no document"
    )
    add_reading_options(command)
    command.add_argument("--append", action="store_true", help="append the documents to finished sources")
    command.add_argument("--overwrite", action="store_true", help="replace finished sources, discard unfinished ones")


def gather(args: argparse.Namespace) -> None:
    """Collect the local corpus."""
    with tqdm(total=int(args.limit_mb * 1e6), unit="B", unit_scale=True, desc="gather", disable=None) as bar:
        paths = gather_local_corpus(args.out, args.limit_mb, bar.update)
    for name, path in paths.items():
        print(f"{name}: {path}, {os.path.getsize(path) / 1e6:.1f} MB")


def build(args: argparse.Namespace) -> None:
    """Tokenize and pack every source."""
    log.setup()
    options = reading_options(args)
    found = _find_sources(args.source, options)
    try:
        _build_sources(args, options, found)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; run the same command again to resume the build") from None


def _build_sources(args: argparse.Namespace, options: ReadOptions, found: dict[str, FoundInput]) -> None:
    with _hosts(args) if args.hostfile else nullcontext(start_workers) as start_pool:
        for name, pattern in args.source:
            with (
                tqdm(unit="B", unit_scale=True, desc=name, delay=0.5, disable=None) as bar,
                logging_redirect_tqdm([log.logger]),
            ):
                progress = BuildProgress(bar)
                manifest = build_source(
                    name, pattern, args.tokenizer, args.out, args.seq_len,
                    validation_fraction=args.validation_fraction, rows_per_shard=args.rows_per_shard,
                    workers=args.workers or CORES, document_chars=args.document_chars, overwrite=args.overwrite,
                    dedup=args.dedup, append=args.append, skip_bad=args.skip_bad,
                    allow_empty=tuple(args.allow_empty), options=options, progress=progress.update,
                    announce=progress.start, start_pool=start_pool, found=found[name],
                )  # fmt: skip
            print(as_line(os.path.join(args.out, name), manifest))


@contextmanager
def _hosts(args: argparse.Namespace) -> Iterator[Callable[[int], WorkerPool]]:
    """Return the start of worker processes on the hosts of --hostfile, which are reached as by the launcher."""
    from llama_ds.data.building.host_workers import HostWorkers, shared_file
    from llama_ds.launch.hostfile import parse_hostfile
    from llama_ds.launch.remote import ssh_command

    hosts = list(parse_hostfile(args.hostfile))
    with shared_file(os.path.abspath(args.out)) as shared:
        argv = [*shipped.command("shards"), "serve", "--shared", shared, "--cwd", os.getcwd()]
        argv += ["--workers", str(args.workers)] if args.workers else []
        commands = {host: ssh_command(host, argv) for host in hosts}
        yield lambda _: HostWorkers(commands)


def serve(args: argparse.Namespace) -> None:
    """Run the tasks of a build on this host."""
    from llama_ds.data.building import host_workers

    with suppress(FileNotFoundError):  # relative paths of the build are then missing, and named
        os.chdir(args.cwd)
    host_workers.serve(args.workers or CORES, args.shared)


def _find_sources(sources: list[tuple[str, str]], options: ReadOptions) -> dict[str, FoundInput]:
    """Find the files of all sources before the first one is built, which may take hours."""
    names = [name for name, _ in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--source {name}=... is given {names.count(name)} times; give each source one name")
    return {name: find_input(pattern, options) for name, pattern in sources}


class BuildProgress:
    """Shows documents and tokens per second on a progress bar over input bytes."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar
        self._documents = self._ids = 0

    def start(self, input_bytes: int) -> None:
        """Set the size of the input."""
        self._bar.total = input_bytes

    def update(self, documents: int, ids: int, input_bytes: int) -> None:
        """Add finished documents, ids and input bytes."""
        if not documents and not self._bar.disable:  # finished by an earlier, killed build: no part of this one's speed
            self._bar.initial += input_bytes
        self._documents += documents
        self._ids += ids
        seconds = max(1e-9, self._bar.format_dict["elapsed"])
        rates = f"{self._documents / seconds:,.0f} docs/s, {self._ids / seconds:,.0f} tokens/s"
        self._bar.set_postfix_str(rates, refresh=False)
        self._bar.update(input_bytes)


def verify(args: argparse.Namespace) -> Answer:
    """Check every byte of the sources; the exit code is 1 if damage was found and not repaired."""
    # imported here because the workers of a build also load this file
    from llama_ds.data.source.verify import repair, verify_source

    log.setup()
    found = {}
    for source, store in _stores(args):
        with tqdm(unit=" rows", desc=source, delay=0.5, disable=None) as bar:
            found[source] = verify_source(store, args.workers, bar.update)
        if args.repair:
            repair(store, found[source])
    code = 0 if args.repair or not any(found.values()) else 1
    data = {source: [asdict(damage) for damage in damages] for source, damages in found.items()}
    return Answer(data, "\n".join(_damage_lines(found, args.repair)), code)


def _damage_lines(found: dict[str, list[Damage]], repaired: bool) -> Iterator[str]:
    for source, damages in found.items():
        for damage in damages:
            offset = "" if damage.offset is None else f", first at byte {damage.offset}"
            yield f"{source}: {damage.split} shard {damage.shard}: {damage.reason}{offset}"
        if not damages:
            yield f"{source}: intact"
        else:
            action = (
                f"recorded in {MANIFEST}, so that runs replace them"
                if repaired
                else "copy them again, or record them with --repair"
            )
            yield f"{source}: {len(damages)} of its shards are damaged; {action}"


def audit(args: argparse.Namespace) -> Answer:
    """Return the rows of a step and the documents in them."""
    from llama_ds.data.audit import documents_of_step, open_run

    log.setup()
    rows = documents_of_step(open_run(args.run), args.step)
    lines = []
    for number, row in enumerate(rows):
        lines.append(f"row {number}: {row.source}, epoch {row.epoch}, {row.shard}, row {row.row}")
        for d in row.documents:
            lines.append(f"  {d.place}  ids {d.first} to {d.last} of {d.length}  sha256 {d.digest}...")
    return Answer([asdict(row) for row in rows], "\n".join(lines))


def consumed(args: argparse.Namespace) -> Answer:
    """Return the tokens and epochs that a run reads of each source before --step."""
    from llama_ds.data.audit import open_run

    recorded = open_run(args.run)
    run = recorded.config
    step = run.training.steps if args.step is None else args.step
    if not 0 <= step <= run.training.steps:
        raise UserError(f"--step {step} is not between 0 and the run's {run.training.steps} steps")
    consumed = recorded.consumed(step)
    read = {name: (rows * run.data.seq_len, epochs) for name, (rows, epochs) in consumed.items()}
    lines = [f"  {name}: {tokens:,} tokens, {epochs:.3f} epochs" for name, (tokens, epochs) in read.items()]
    data = {name: {"tokens": tokens, "epochs": epochs} for name, (tokens, epochs) in read.items()}
    return Answer(data, "\n".join([f"{args.run}: read before step {step}", *lines]))


def info(args: argparse.Namespace) -> Answer:
    """Describe the sources."""
    from llama_ds.data.source.shards import read_manifest  # imported here as in `verify`
    from llama_ds.data.source.store import open_store

    log.setup()
    manifests = {folder: read_manifest(open_store(folder)) for folder in find_sources(args.dir)}
    times = epochs(manifests, args.rows, dict(args.weight)) if args.rows else {}
    sources = [(folder, m, times.get(m.source)) for folder, m in manifests.items()]
    return Answer([as_data(*source) for source in sources], "\n".join(as_line(*source) for source in sources))


def report(args: argparse.Namespace) -> Answer:
    """Report on the sources; write the page of --html."""
    from llama_ds.data.report.collect import collect, shards_to_read
    from llama_ds.data.report.page import page
    from llama_ds.data.report.tables import as_data, as_text, remarks, shared_with_others
    from llama_ds.data.source.shards import read_manifest  # imported here as in `verify`
    from llama_ds.data.text.tokenizer import Tokenizer

    log.setup()
    tokenizer = Tokenizer(args.tokenizer) if args.tokenizer else None
    found = []
    for folder, store in _stores(args):
        total = shards_to_read(read_manifest(store))
        with tqdm(total=total, unit=" shards", desc=folder, delay=0.5, disable=None) as bar:
            found.append(collect(store, tokenizer, args.samples, args.workers, bar.update))
    data = [as_data(*source) for source in zip(found, shared_with_others(found), strict=True)]
    limits = [line for source in found for line in remarks(source)]
    if args.html:
        save_text(args.html, page(f"Data in {args.dir}", data, limits))
    return Answer(data, "\n".join(map(as_text, data)), remarks=limits)


def _stores(args: argparse.Namespace) -> Iterator[tuple[str, Store]]:
    """Yield each source of `args.dir`, opened with the options of `_add_access_options`."""
    from llama_ds.data.source.cache import Cache
    from llama_ds.data.source.store import open_store

    cache = Cache(args.cache_dir, round(args.cache_gib * 2**30)) if args.cache_dir else None
    return ((source, open_store(source, cache)) for source in find_sources(args.dir))


def unigram(args: argparse.Namespace) -> None:
    """Print the loss of the unigram model of a mixture."""
    from llama_ds.data.source.shards import open_source  # imported here as in `verify`
    from llama_ds.data.sources import validation_rows
    from llama_ds.data.unigram import mixture_counts, unigram_loss

    log.setup()
    folders, weights = zip(*args.sources, strict=True)
    counts = mixture_counts([open_source(folder, "train") for folder in folders], weights)
    rows = validation_rows([open_source(folder, "validation") for folder in folders], weights, args.rows)
    print(f"{unigram_loss(counts, rows):.4f} nats per token on {args.rows} validation rows")


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=PATTERN")
    return name, value


def _weight(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=WEIGHT")
    return name, real(0, 1e9, above=True)(value)


if __name__ == "__main__":
    sys.exit(main())
