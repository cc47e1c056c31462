#!/usr/bin/env python3
"""Measure a machine's compute and communication rates for the planner, and validate the planner's predictions."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_ds.command_line import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from llama_ds import shipped
from llama_ds.checkpoint.model_shape import read_models
from llama_ds.command_line import (
    Answer,
    add_results,
    check_file,
    new_parser,
    port,
    real,
    run,
    seconds,
    subcommands,
    whole,
)
from llama_ds.config.run_file import find_run_file, load_run
from llama_ds.config.text import save_text
from llama_ds.errors import UserError
from llama_ds.launch.command import LAUNCHERS
from llama_ds.perf.plan import hardware
from llama_ds.perf.plan.curves import OPERATIONS

if TYPE_CHECKING:
    from llama_ds.benchmarks.machine.on_ranks import Cluster

EXAMPLES = """examples:
  tools/machine.py gemm --hostfile hostfiles/32x8 --cluster ours.yaml --power-w 400
  tools/machine.py comm --hostfile hostfiles/32x8 --cluster ours.yaml --operations all_reduce
  tools/machine.py check-plan ds_configs/llama_7b.yaml --hostfile hostfiles/32x8 --cluster ours.yaml \\
      --layout parallel.pp=2 --layout parallel.tp=4
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    read_models()
    return run(parser(), argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(None, __doc__, EXAMPLES)
    add = subcommands(parser)
    words = "measure compute rates of all ranks of a hostfile: products, attention and pointwise kernels"
    command = add("gemm", gemm, words)
    words = "run file with the attention backend (default: %(default)s)"
    command.add_argument("--run", default=find_run_file("quickstart"), help=words)
    command.add_argument("--dtype", choices=("bf16", "fp32"), help="(default: native dtype of the device)")
    command.add_argument("--power-w", type=real(0, above=True), help="power of one device, for the energy of runs")
    command.add_argument("--quick", action="store_true", help="few small sizes, for a smoke test only")
    _add_cluster(command)
    command = add("comm", comm, "measure communication of the ranks of a hostfile, like nccl-tests")
    command.add_argument("--operations", nargs="+", choices=OPERATIONS, help="(default: all)")
    command.add_argument("--min-bytes", type=whole(4), default=1 << 12, help="smallest tensor (default: %(default)s)")
    command.add_argument("--max-bytes", type=whole(4), help="largest tensor (default: 256 MiB on CUDA, else 16 MiB)")
    command.add_argument("--seconds", type=seconds, default=0.3, help="time for each size (default: %(default)s)")
    _add_cluster(command)
    words = "compare predicted with measured step times, for layouts of a run on the ranks of a hostfile"
    command = add("check-plan", check_plan, words)
    command.add_argument("run", help="run file")
    words = "overrides of the run file; repeat for more layouts"
    command.add_argument("--layout", nargs="+", action="append", metavar="key=value", help=words)
    command.add_argument("--rounds", type=whole(), default=3, help="rounds over all layouts (default: %(default)s)")
    command.add_argument(
        "--steps", type=whole(), default=5, help="timed steps per layout and round (default: %(default)s)"
    )
    _add_cluster(command)
    return parser


def _add_cluster(command: argparse.ArgumentParser) -> None:
    words = "YAML description of the machine, for tools/plan.py --gpu FILE"
    command.add_argument("--cluster", required=True, metavar="FILE", help=words)
    command.add_argument(
        "--hostfile", default=str(shipped.folder("hostfiles") / "local"), help="(default: %(default)s)"
    )
    command.add_argument("--launcher", choices=LAUNCHERS, default="pdsh", help="(default: %(default)s)")
    command.add_argument("--nic", default="", help="network interface of the ranks (default: the one to rank 0)")
    command.add_argument("--ssh-port", type=port)
    add_results(command)


def gemm(args: argparse.Namespace) -> Answer:
    """Measure compute rates and write them to the cluster's YAML."""
    wanted = load_run(args.run)
    from llama_ds.benchmarks.machine import describe
    from llama_ds.benchmarks.machine.on_ranks import measure

    check_file("--cluster", args.cluster)
    cluster = _cluster(args)
    machine = describe.begin(cluster.file, cluster.file.stem, cluster.slots)
    request = {"what": "computing", "run": os.path.abspath(wanted.path), "dtype": args.dtype, "quick": args.quick}
    found = measure(cluster, request)
    machine = describe.with_computing(machine, found, args.power_w)
    for rank, share in describe.slow_ranks(found):
        print(f"rank {rank} computes products at {share:.0%} of the median rank's rate", file=sys.stderr)
    save_text(args.cluster, hardware.text(machine))
    return Answer(found, describe.computing_table(machine))


def comm(args: argparse.Namespace) -> Answer:
    """Measure communication and write the results to the cluster's YAML."""
    from llama_ds.benchmarks.machine import describe
    from llama_ds.benchmarks.machine.on_ranks import measure

    check_file("--cluster", args.cluster)
    cluster = _cluster(args)
    machine = describe.begin(cluster.file, cluster.file.stem, cluster.slots)
    if args.max_bytes and args.max_bytes < args.min_bytes:
        raise UserError(f"command line: --min-bytes {args.min_bytes} is above --max-bytes {args.max_bytes}")
    names = ("operations", "min_bytes", "max_bytes", "seconds")
    found = measure(cluster, {"what": "links", **{name: getattr(args, name) for name in names}})
    machine = describe.with_links(machine, found)
    save_text(args.cluster, hardware.text(machine))
    return Answer(found, describe.links_table(machine))


def check_plan(args: argparse.Namespace) -> Answer:
    """Compare the planner's predictions with measurements on the described machine."""
    from llama_ds.benchmarks.machine.check import compare, comparison_table
    from llama_ds.benchmarks.machine.on_ranks import measure
    from llama_ds.perf.plan.estimate import estimate

    cluster = _cluster(args)
    machine = hardware.load(args.cluster)
    layouts = args.layout or [[]]
    runs = [load_run(args.run, words) for words in layouts]
    planned = [estimate(one, sum(cluster.hosts.values()), machine) for one in runs]
    request = {"what": "layouts", "run": os.path.abspath(runs[0].path), "layouts": layouts}
    results = compare(planned, measure(cluster, {**request, "rounds": args.rounds, "steps": args.steps}))
    return Answer(results, comparison_table(results))


def _cluster(args: argparse.Namespace) -> Cluster:
    from llama_ds.benchmarks.machine.on_ranks import Cluster

    return Cluster(Path(args.cluster), args.hostfile, args.launcher, args.nic, args.ssh_port)


if __name__ == "__main__":
    sys.exit(main())
