#!/usr/bin/env python3
"""Measure training steps, layers, the data path and checkpoints, ours against others'; say where a job's time goes."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llama_ds.config.recompute import POLICIES
from llama_ds.config.run_file import load_run
from llama_ds.config.schema import ParallelConfig, RunConfig
from llama_ds.config.text import save_text
from llama_ds.errors import UserError
from llama_ds.launch.command import LAUNCHERS, exported_to_ranks
from llama_ds.launch.hostfile import parse_hostfile
from llama_ds.perf.plan.curves import OPERATIONS
from llama_ds.perf.trace.job import DEFAULT_RANKS
from llama_ds.perf.trace.kinds import METRICS

# What is heavy is imported by the commands that want it: analyse must run where torch is not, and start at once.
if TYPE_CHECKING:
    from llama_ds.benchmarks.step import Step, Timing
    from llama_ds.data.text.tokenizer import Tokenizer
    from llama_ds.perf.trace.analyse import Analysis

EXAMPLES = """examples:
  tools/throughput.py compare-hf
  tools/throughput.py layer --shape 65b --tp 8 --seq-len 4096 --device cuda --out measured.json
  tools/throughput.py data --streaming-python /tmp/rivals/bin/python --out measured.json
  tools/throughput.py checkpoint --folder /mnt/scratch --out measured.json
  tools/throughput.py train ds_configs/quickstart.yaml parallel.micro_batch=4 --ranks first,last --steps 3
  tools/throughput.py analyse runs/quickstart-profile/trace --svg step.svg --fail-if 'bubble>20' --fail-if 'gemm<40'
  tools/throughput.py compare-hf --batch 2 --seq-len 512 model.hidden_size=1024 model.intermediate_size=2752
"""
DATA = """Build, read, open and resume data on this machine, every measurement in a fresh process.

mosaicml-streaming and datasets want other versions than we do, so they need an environment of their own (a CUDA torch):
  python3 -m venv /tmp/rivals
  /tmp/rivals/bin/pip install mosaicml-streaming==0.13.0 datasets
Without --streaming-python both are left out. TMPDIR gets about 1 GB. 100,000 shards need 12 GB of memory there.
"""
DTYPES = ("fp32", "bf16", "fp16")
PARTS = ("build", "read", "open", "resume")  # of the data path
SHAPES = {"quickstart": "quickstart", "7b": "llama_7b", "13b": "llama_13b", "33b": "llama_33b", "65b": "llama_65b"}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return the exit code."""
    args = parse(argv)
    try:
        return COMMANDS[args.command](args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.EXIT_CODE


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "compare-hf",
        help="a whole training step of one process, ours and transformers' LlamaForCausalLM with torch's AdamW",
        epilog=EXAMPLES,
        formatter_class=formatter,
    )
    command.add_argument("overrides", nargs="*", metavar="key=value", help="of the run file: another shape")
    command.add_argument("--run", default="ds_configs/quickstart.yaml", help="run file (default: %(default)s)")
    command.add_argument("--dtype", choices=DTYPES, default="fp32")
    command.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help="of our engine (default: fp32 0, bf16 1)")
    _common(command, policy="none")  # as transformers and as run files do
    command = commands.add_parser(
        "layer",
        help="one decoder layer forward and backward: written out, by autograd, and transformers' LlamaDecoderLayer",
        epilog=EXAMPLES,
        formatter_class=formatter,
    )
    command.add_argument("--shape", choices=SHAPES, default="quickstart", help="(default: %(default)s)")
    command.add_argument("--tp", type=int, default=1, help="time one rank's part of tp, without communication")
    command.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    command.add_argument("--dtype", choices=DTYPES, help="(default: bf16 on cuda, fp32 on cpu)")
    _common(command, policy="selective")
    command = commands.add_parser(
        "data",
        help="building, reading, opening and resuming: ours, sentencepiece, Hugging Face, webdataset, streaming",
        description=DATA,
        epilog=EXAMPLES,
        formatter_class=formatter,
    )
    command.add_argument("--corpus", nargs="+", default=[], metavar="PATTERN", help="(default: texts of this machine)")
    command.add_argument("--corpus-mb", type=int, help="text to build from (default: 30); more tells more of workers")
    command.add_argument("--tokenizer", default="", metavar="MODEL", help="(default: one is trained, of 4096 ids)")
    command.add_argument("--streaming-python", default="", metavar="PYTHON", help="that has the other packages")
    command.add_argument("--run", default=str(ROOT / "ds_configs" / "llama_65b.yaml"), help="that is resumed")
    command.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    command.add_argument("--quick", action="store_true", help="small sizes: to see that it works, not for numbers")
    command.add_argument("--repeats", type=int, default=5, help="processes of each (default: %(default)s)")
    _results(command)
    command = commands.add_parser(
        "checkpoint",
        help="saving, loading, resharding and converting: ours, the disk, torch.save, safetensors",
        epilog=EXAMPLES,
        formatter_class=formatter,
    )
    command.add_argument("overrides", nargs="*", metavar="key=value", help="of ds_configs/quickstart.yaml")
    command.add_argument(
        "--folder", default=tempfile.gettempdir(), help="on the disk to measure (default: %(default)s)"
    )
    command.add_argument("--repeats", type=int, default=5, help="turns (default: %(default)s)")
    _results(command)
    words = "where the time of recorded steps went, from what logging.trace_step or train left"
    command = commands.add_parser(
        "analyse", help=words, description=words, epilog=metrics_help(), formatter_class=formatter
    )
    command.add_argument("folders", nargs="+", metavar="FOLDER", help="folder of rank*.json, such as runs/NAME/trace")
    command.add_argument("--merge", action="store_true", help="write one trace of all ranks for ui.perfetto.dev too")
    _analysis(command)
    _results(command)
    words = "record and profile steps of the real job, in a folder of its own, and say where their time went"
    command = commands.add_parser("train", help=words, description=words, epilog=EXAMPLES, formatter_class=formatter)
    command.add_argument("run", help="run file")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="of the run file")
    command.add_argument(
        "--ranks",
        default=DEFAULT_RANKS,
        metavar="R",
        help="that run torch's profiler: numbers, all, none, and first, middle, last, of whose stages the rank with dp "
        "and tp 0 is meant (default: %(default)s)",
    )
    command.add_argument(
        "--steps", type=int, default=3, help="to record, and as many again with the profiler (default: %(default)s)"
    )
    command.add_argument("--warmup", type=int, default=3, help="steps before them (default: %(default)s)")
    command.add_argument("--out", metavar="FOLDER", help="of the recording (default: the run's own, and -profile)")
    where = command.add_mutually_exclusive_group()
    where.add_argument("--hostfile", help="the job's hosts, as for tools/launch.py")
    where.add_argument("--num-ranks", type=int, help="on this machine (default: GPUs, or parallel.pp * parallel.tp)")
    command.add_argument("--launcher", choices=LAUNCHERS, default="pdsh", help="(default: %(default)s)")
    command.add_argument("--nic", default="", help="interface of the ranks' traffic (default: the one to rank 0)")
    command.add_argument("--ssh-port", type=int)
    command.add_argument("--json", action="store_true", help="print the results as JSON")
    _analysis(command)
    words = "how fast all ranks of a hostfile compute: products, attention, pointwise kernels, for the planner"
    command = commands.add_parser("gemm", help=words, description=words, epilog=EXAMPLES, formatter_class=formatter)
    command.add_argument("--run", default=str(ROOT / "ds_configs" / "quickstart.yaml"), help="whose attention backend")
    command.add_argument("--dtype", choices=("bf16", "fp32"), help="(default: what the device computes natively)")
    command.add_argument("--power-w", type=float, help="of one device, for the energy of runs")
    command.add_argument("--quick", action="store_true", help="few small sizes: to see that it works, not for numbers")
    _machine(command)
    words = "how fast the ranks of a hostfile communicate, as nccl-tests measures, for the planner"
    command = commands.add_parser("comm", help=words, description=words, epilog=EXAMPLES, formatter_class=formatter)
    command.add_argument("--operations", nargs="+", choices=OPERATIONS, help="(default: all)")
    command.add_argument("--min-bytes", type=int, default=1 << 12, help="smallest tensor (default: %(default)s)")
    command.add_argument("--max-bytes", type=int, help="largest (default: 256 MiB on CUDA, else 16)")
    command.add_argument("--seconds", type=float, default=0.3, help="for each size (default: %(default)s)")
    _machine(command)
    words = "what the planner predicts for layouts of a run beside what they take on the ranks of a hostfile"
    command = commands.add_parser(
        "check-plan", help=words, description=words, epilog=EXAMPLES, formatter_class=formatter
    )
    command.add_argument("run", help="run file")
    command.add_argument(
        "--layout", nargs="+", action="append", metavar="key=value", help="overrides of the run file; again for others"
    )
    command.add_argument("--rounds", type=int, default=3, help="turns of all layouts (default: %(default)s)")
    command.add_argument("--steps", type=int, default=5, help="timed steps in each (default: %(default)s)")
    _machine(command)
    return parser.parse_args(argv)


def metrics_help() -> str:
    """Return what --fail-if can ask for."""
    lines = [f"  {name:20} {text}" for name, text in METRICS.items()]
    return "\n".join(["metrics, in percent:", *lines, "", EXAMPLES])


def _analysis(command: argparse.ArgumentParser) -> None:
    command.add_argument("--svg", metavar="FILE", help="draw the first folder's first step")
    command.add_argument(
        "--fail-if",
        action="append",
        default=[],
        metavar="LIMIT",
        help="exit 1 where it holds: a metric, one of > < >= <=, percent, as 'bubble>20'; again for more",
    )


def _common(command: argparse.ArgumentParser, policy: str) -> None:
    command.add_argument("--batch", type=int, help="rows per step (default: the run's parallel.micro_batch)")
    command.add_argument("--seq-len", type=int, help="tokens per row (default: the run's data.seq_len)")
    command.add_argument("--policy", choices=POLICIES, default=policy, help="of our layers (default: %(default)s)")
    command.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores)")
    command.add_argument("--repeats", type=int, default=15, help="timed steps of each (default: %(default)s)")
    _results(command)


def _machine(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--cluster", required=True, metavar="FILE", help="YAML of the machine: tools/plan.py --gpu FILE"
    )
    command.add_argument("--hostfile", default=str(ROOT / "hostfiles" / "local"), help="(default: %(default)s)")
    command.add_argument("--launcher", choices=LAUNCHERS, default="pdsh", help="(default: %(default)s)")
    command.add_argument("--nic", default="", help="interface of the ranks' traffic (default: the one to rank 0)")
    command.add_argument("--ssh-port", type=int)
    _results(command)


def _results(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print the results as JSON")
    command.add_argument("--out", metavar="FILE", help="write the results as JSON to FILE too")


def _settings(args: argparse.Namespace, *more: str) -> dict[str, Any]:
    names = ("batch", "seq_len", "dtype", "policy", "threads", "repeats", *more)
    return {name: getattr(args, name) for name in names}


def _publish(args: argparse.Namespace, results: dict[str, Any], table: str) -> None:
    text = json.dumps(results, indent=1)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text + "\n")
    print(text if args.json else table)


def _timed(steps: dict[str, Step], repeats: int) -> dict[str, Timing]:
    from tqdm import tqdm

    from llama_ds.benchmarks.step import time_interleaved

    with tqdm(total=len(steps) * (repeats + 2), unit="step", disable=None) as bar:
        return time_interleaved(steps, repeats, tick=bar.update)


def _check_positive(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) < 1:
            raise UserError(f"command line: --{name.replace('_', '-')} {getattr(args, name)} is not positive")


def layer(args: argparse.Namespace) -> int:
    """Time one decoder layer."""
    import torch

    from llama_ds.benchmarks.layer import shard
    from llama_ds.benchmarks.report import layer_results, layer_table
    from llama_ds.checkpoint import weights

    with redirect_stdout(sys.stderr):  # DeepSpeed logs to the stdout that it finds when imported; ours is for results
        from llama_ds.benchmarks import against_transformers
        from llama_ds.training.host_memory import keep_freed_memory

    run = load_run(str(ROOT / "ds_configs" / f"{SHAPES[args.shape]}.yaml"))
    _fill_sizes(args, run)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    _check_positive(args, "batch", "seq_len", "threads", "repeats", "tp")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("command line: --device cuda: torch finds no CUDA device here; use --device cpu")
    whole = run.model
    if any(size % args.tp for size in (whole.num_attention_heads, whole.num_key_value_heads, whole.intermediate_size)):
        raise UserError(
            f"command line: --tp {args.tp} does not divide the {whole.num_attention_heads} query heads, "
            f"{whole.num_key_value_heads} key-value heads or {whole.intermediate_size} features of {args.shape}"
        )
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    device, dtype, model = torch.device(args.device), weights.DTYPES[args.dtype], shard(whole, args.tp)
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(args.batch, args.seq_len, model.hidden_size, generator=generator) for _ in range(2))
    x, grad = x.to(device, dtype), grad.to(device, dtype)
    run = replace(run, model=model, data=replace(run.data, seq_len=args.seq_len, document_mask=False))
    contestants, args.attention = against_transformers.layers(run, args.policy, device, dtype)
    steps = {name: contestant.step(x, grad) for name, contestant in contestants.items()}
    measured = {name: (c.saved_bytes(x), c.peak_bytes(steps[name], device)) for name, c in contestants.items()}
    timings = _timed(steps, args.repeats)
    against_transformers.check_gradients(timings, args.dtype)
    results = layer_results(model, _settings(args, "shape", "tp", "device", "attention"), timings, measured)
    _publish(args, results, layer_table(results))
    return 0


def analyse(args: argparse.Namespace) -> int:
    """Say where the time of recorded steps went."""
    from llama_ds.perf.trace.files import analyse_folder
    from llama_ds.perf.trace.limits import parse_limit
    from llama_ds.perf.trace.merge import merge
    from llama_ds.perf.trace.report import as_json, report, table

    limits = [parse_limit(text, METRICS) for text in args.fail_if]
    found = {folder: analyse_folder(folder) for folder in args.folders}
    paths = [f"trace of all ranks, for ui.perfetto.dev: {merge(folder)}" for folder in args.folders if args.merge]
    _draw(args.svg, args.folders[0])
    reports = [f"{folder}: {report(analysis)}" for folder, analysis in found.items()]
    tables = [table(found)] if len(found) > 1 else []
    text = "\n\n".join([*reports, *tables, *paths])
    _publish(args, {folder: as_json(analysis) for folder, analysis in found.items()}, text)
    return _judge(found, limits)


def train(args: argparse.Namespace) -> int:
    """Record and profile steps of the real job."""
    from llama_ds.launch.hostfile import write_hostfile
    from llama_ds.layout.layout import resolve_layout
    from llama_ds.layout.ranks import choose_ranks
    from llama_ds.perf.trace.files import analyse_folder
    from llama_ds.perf.trace.job import recording_overrides
    from llama_ds.perf.trace.limits import parse_limit
    from llama_ds.perf.trace.merge import merge
    from llama_ds.perf.trace.report import as_json, report

    limits = [parse_limit(text, METRICS) for text in args.fail_if]
    run = load_run(args.run, args.overrides)
    environment = dict(os.environ)
    hosts = parse_hostfile(args.hostfile) if args.hostfile else {"localhost": _local_ranks(args, run, environment)}
    layout = resolve_layout(run, sum(hosts.values()))
    out = Path(args.out or f"{run.run_dir}-profile").absolute()
    ranks = choose_ranks(args.ranks, layout, "--ranks")
    overrides = [*args.overrides, *recording_overrides(run, str(out), args.warmup, args.steps, ranks)]
    load_run(args.run, overrides)
    try:
        out.mkdir(parents=True, exist_ok=True)
        hostfile = args.hostfile or str(out / "hostfile")
        if not args.hostfile:
            write_hostfile(hostfile, hosts)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); give a folder of yours") from None
    command = [sys.executable, str(ROOT / "tools" / "launch.py"), args.run, *overrides, "--hostfile", hostfile]
    command += ["--launcher", args.launcher, *(["--nic", args.nic] if args.nic else [])]
    command += ["--ssh-port", str(args.ssh_port)] if args.ssh_port else []
    code = _run_to_its_end(command, environment)
    if code:
        return code
    folder = str(out / "trace")
    merged, analysis = merge(folder), analyse_folder(folder)
    _draw(args.svg, folder)
    results = {**as_json(analysis), "profiled_ranks": ranks, "folder": folder, "trace": str(merged)}
    paths = f"records: {folder}\ntrace of all ranks, for ui.perfetto.dev: {merged}"
    print(json.dumps(results, indent=1) if args.json else f"\n{report(analysis)}\n\n{paths}")
    return _judge({folder: analysis}, limits)


def _local_ranks(args: argparse.Namespace, run: RunConfig, environment: dict[str, str]) -> int:
    """Return how many ranks this machine is to run; without a GPU for each they run on its cores, each on a share."""
    import torch

    gpus, least = torch.cuda.device_count(), run.parallel.pp * run.parallel.tp
    if args.num_ranks is not None:
        _check_positive(args, "num_ranks")
    ranks = args.num_ranks or max(least, gpus // least * least)
    if gpus < ranks:
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    return ranks


def _run_to_its_end(command: list[str], environment: dict[str, str]) -> int:
    """Run a command whose output is for people; an interruption is its to handle. Return its exit code."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's reaches it too
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        code = process.wait()
    signal.signal(signal.SIGINT, before)
    return code if code >= 0 else 128 - code


def _draw(path: str | None, folder: str) -> None:
    from llama_ds.perf.trace.picture import picture
    from llama_ds.perf.trace.read import read, shown

    if path:
        save_text(path, picture(read(folder, shown(folder)), folder))


def _judge(found: dict[str, Analysis], limits: list[Any]) -> int:
    """Say which limits are not kept; return the exit code."""
    broken = [
        f"{folder}: {text}" for folder, a in found.items() for limit in limits if (text := limit.broken(a.metrics))
    ]
    for line in broken:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if broken else 0


def gemm(args: argparse.Namespace) -> int:
    """Measure how fast ranks compute; write it to the cluster's YAML."""
    from llama_ds.benchmarks.machine import describe
    from llama_ds.perf.plan import hardware

    load_run(args.run)
    asked = {"what": "computing", "run": os.path.abspath(args.run), "dtype": args.dtype, "quick": args.quick}
    machine = describe.begin(Path(args.cluster), Path(args.cluster).stem, _equal_slots(args))
    found = _on_ranks(args, asked)
    machine = describe.with_computing(machine, found, args.power_w)
    for rank, share in describe.slow_ranks(found):
        print(f"rank {rank} multiplies at {share:.0%} of the median rank's rate", file=sys.stderr)
    save_text(args.cluster, hardware.text(machine))
    _publish(args, found, describe.computing_table(machine))
    return 0


def comm(args: argparse.Namespace) -> int:
    """Measure how fast ranks communicate; write it to the cluster's YAML."""
    from llama_ds.benchmarks.machine import describe
    from llama_ds.perf.plan import hardware

    machine = describe.begin(Path(args.cluster), Path(args.cluster).stem, _equal_slots(args))
    if args.min_bytes < 4 or (args.max_bytes or args.min_bytes) < args.min_bytes:
        raise UserError(f"command line: --min-bytes {args.min_bytes} is not 4 to --max-bytes {args.max_bytes}")
    names = ("operations", "min_bytes", "max_bytes", "seconds")
    found = _on_ranks(args, {"what": "links", **{name: getattr(args, name) for name in names}})
    machine = describe.with_links(machine, found)
    save_text(args.cluster, hardware.text(machine))
    _publish(args, found, describe.links_table(machine))
    return 0


def check_plan(args: argparse.Namespace) -> int:
    """Hold the planner against the machine that it was told about."""
    from llama_ds.benchmarks.machine.check import compare, comparison_table
    from llama_ds.perf.plan import hardware
    from llama_ds.perf.plan.estimate import estimate

    _check_positive(args, "rounds", "steps")
    machine = hardware.load(args.cluster)
    world = _equal_slots(args) * len(parse_hostfile(args.hostfile))
    layouts = args.layout or [[]]
    planned = [estimate(load_run(args.run, words), world, machine) for words in layouts]
    asked = {"what": "layouts", "run": os.path.abspath(args.run), "layouts": layouts}
    found = _on_ranks(args, {**asked, "rounds": args.rounds, "steps": args.steps})
    results = compare(planned, found)
    _publish(args, results, comparison_table(results))
    return 0


def _equal_slots(args: argparse.Namespace) -> int:
    slots = set(parse_hostfile(args.hostfile).values())
    if len(slots) != 1:
        raise UserError(
            f"{args.hostfile}: hosts have {sorted(slots)} slots; the planner takes nodes to be alike: make them equal"
        )
    return slots.pop()


def _on_ranks(args: argparse.Namespace, asked: dict[str, Any]) -> dict[str, Any]:
    """Have all slots of the hostfile measure; return what rank 0 wrote, beside the cluster's file: hosts share that."""
    from llama_ds.launch.run_ranks import run_ranks

    hosts, slots = parse_hostfile(args.hostfile), _equal_slots(args)
    beside = Path(args.cluster).resolve().parent
    beside.mkdir(parents=True, exist_ok=True)
    exports = exported_to_ranks(os.environ)
    exports.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // slots)))
    with tempfile.TemporaryDirectory(prefix="measure-", dir=beside) as folder:
        out = Path(folder, "found.json")
        text = json.dumps({**asked, "out": str(out), "slots": slots, "nic": args.nic})
        settings = {"launcher": args.launcher, "nic": args.nic, "ssh_port": args.ssh_port}
        script = str(ROOT / "llama_ds" / "benchmarks" / "machine" / "rank.py")
        code = run_ranks(script, [text], hosts, Path(folder), exports=exports, **settings)
        if code or not out.exists():
            raise UserError(f"{args.hostfile}: a rank ended with exit code {code}; its own message stands above")
        return json.loads(out.read_text())


def data(args: argparse.Namespace) -> int:
    """Measure the data path."""
    from tqdm import tqdm

    from llama_ds.benchmarks.data import report as data_report
    from llama_ds.benchmarks.data.bench import QUICK, Sizes
    from llama_ds.benchmarks.data.run import measure, set_up
    from llama_ds.checkpoint.formats.hf_tokenizer import tokenizer_json

    sizes = QUICK if args.quick else Sizes()
    if args.corpus_mb is not None:
        _check_positive(args, "corpus_mb")
        sizes = replace(sizes, corpus_mb=args.corpus_mb)
    _check_positive(args, "repeats")

    def hf_json(tokenizer: Tokenizer) -> dict[str, Any]:
        return tokenizer_json(tokenizer.pieces(), tokenizer.prefixed)

    with tempfile.TemporaryDirectory(prefix="throughput-data-") as folder, tqdm(unit="run", disable=None) as bar:

        def tick(name: str) -> None:
            bar.set_description(name)
            bar.update()

        bench = set_up(folder, args.corpus, args.tokenizer, hf_json, sizes, args.repeats, args.streaming_python, tick)
        results = measure(bench, args.only or PARTS, args.run)
    _publish(args, results, data_report.table(results))
    return 0


def checkpoints(args: argparse.Namespace) -> int:
    """Measure checkpoints."""
    with redirect_stdout(sys.stderr):
        from llama_ds.benchmarks.checkpoint import run as checkpoint_benchmark

    with tempfile.TemporaryDirectory(prefix="throughput-checkpoint-", dir=args.folder) as folder:
        results = checkpoint_benchmark.measure(args.overrides, folder, args.repeats)
    _publish(args, results, checkpoint_benchmark.table(results))
    return 0


def compare_hf(args: argparse.Namespace) -> int:
    """Time whole training steps of one process against transformers."""
    import numpy as np
    import torch

    from llama_ds.benchmarks.report import step_results, step_table

    with redirect_stdout(sys.stderr):
        from llama_ds.benchmarks import against_transformers

    run = _benchmark_run(args)
    torch.set_num_threads(args.threads)
    batch = np.random.default_rng(0).integers(0, run.model.vocab_size, (args.batch, args.seq_len + 1))
    steps = against_transformers.steps(run, batch, args.dtype)
    timings = _timed(steps, args.repeats)
    against_transformers.check_losses(timings, args.dtype)
    results = step_results(run.model, _settings(args, "zero"), timings)
    _publish(args, results, step_table(results))
    return 0


def _fill_sizes(args: argparse.Namespace, run: RunConfig) -> None:
    args.batch = run.parallel.micro_batch if args.batch is None else args.batch
    args.seq_len = run.data.seq_len if args.seq_len is None else args.seq_len


def _benchmark_run(args: argparse.Namespace) -> RunConfig:
    """Return the run as one process takes it, without accumulation; fill what the command line leaves to it."""
    run = load_run(args.run, args.overrides)
    _fill_sizes(args, run)
    args.zero = int(args.dtype == "bf16") if args.zero is None else args.zero
    _check_positive(args, "batch", "seq_len", "threads", "repeats")
    return replace(
        run,
        data=replace(run.data, seq_len=args.seq_len),
        training=replace(run.training, global_batch=args.batch),
        parallel=ParallelConfig(micro_batch=args.batch, recompute=args.policy),
        deepspeed={"zero_optimization": {"stage": args.zero}, "bf16": {"enabled": args.dtype == "bf16"}},
    )


COMMANDS = {
    "compare-hf": compare_hf,
    "layer": layer,
    "data": data,
    "checkpoint": checkpoints,
    "analyse": analyse,
    "train": train,
    "gemm": gemm,
    "comm": comm,
    "check-plan": check_plan,
}

if __name__ == "__main__":
    sys.exit(main())
