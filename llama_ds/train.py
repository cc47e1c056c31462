"""Train the model of a run file: the script that deepspeed, torchrun or mpirun starts on every rank.

deepspeed --num_gpus 8 llama_ds/train.py ds_configs/llama_7b.yaml training.steps=1000
torchrun --nproc_per_node 8 llama_ds/train.py ds_configs/llama_7b.yaml
python llama_ds/train.py ds_configs/llama_65b.yaml --dry-run --world 2048
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

# Python puts a script's folder first on sys.path, where `data` and `config` would shadow modules of other packages.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from llama_ds.job.folder import MPI_LAUNCHERS, VARIABLE, current
from llama_ds.job.launcher_watch import watch_launcher
from llama_ds.job.own_session import leave_session_of_mpirun
from llama_ds.job.requests import Request, Requests, Stage
from llama_ds.job.wire import Phase

REQUESTS = Requests()
if __name__ == "__main__":  # before the imports, which take seconds
    leave_session_of_mpirun()
    REQUESTS.listen()
    gc.disable()  # until all is imported: modules leave no garbage, but would be searched for it a hundred times
    if VARIABLE not in os.environ:
        watch_launcher(REQUESTS.ask)

from llama_ds import log
from llama_ds.checkpoint.model_shape import read_models
from llama_ds.command_line import INTERRUPTED, TERMINATED, ending_quietly, whole
from llama_ds.config.boards import check_packages
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.document_marks import LLAMA_MARKS
from llama_ds.config.run_file import load_run
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.job.heartbeat import Heartbeat, check_hosts, check_world, host_identity, keep_output
from llama_ds.launch.hostfile import check_launcher_hostfile
from llama_ds.layout.layout import Layout, resolve_layout
from llama_ds.shipped import as_typed

if TYPE_CHECKING:
    from llama_ds.parallel.world import RankInfo


def main() -> int:
    """Run the command line and return the exit code. A user error ends every rank with code 2 and one message.

    A run that is asked to end saves a checkpoint; it returns 0 then, or 130 after Ctrl-C. If it is asked before its
    first step it returns 143 or 130.
    """
    REQUESTS.listen()  # where another program has imported this one
    try:
        arguments = parse(sys.argv[1:])
    except (argparse.ArgumentError, UserError) as error:
        print(as_typed(f"error: command line: {error}"), file=sys.stderr)
        return UserError.EXIT_CODE
    log.silence_libraries()
    read_models()
    try:
        from llama_ds.parallel import world
    except ValueError as error:  # torch reads some variables while it is imported
        about = str(error).strip().partition("\n")[0]
        print(
            f"error: environment: torch refuses a TORCH_* variable ({about}); correct it, or unset it", file=sys.stderr
        )
        return UserError.EXIT_CODE

    if arguments.dry_run:
        with world.failing_together():
            describe(arguments)
        return 0
    if not keeps_ranks():
        return take_part(arguments)
    from llama_ds.parallel import leaving  # with DeepSpeed: others connect to their launcher before they import it

    at_start, undo = dict(os.environ), leaving.state_of_process()
    while True:
        try:
            return take_part(arguments)
        except leaving.Left as left:
            dropped = left.dropped
        departure = REQUESTS.departure
        assert departure
        if not leaving.leave(departure, dropped, undo):
            return 1
        sys.argv = departure.become_next(at_start)
        REQUESTS.begin_again()
        arguments = parse(sys.argv[1:])


def keeps_ranks() -> bool:
    """Return whether this rank may go on in another attempt; `take_part` reports a job's folder that it cannot read."""
    with suppress(UserError):
        job = current(os.environ)
        return job is not None and job.keeps_ranks
    return False


def take_part(arguments: argparse.Namespace) -> int:
    """Train as a rank of the job or attempt that the environment describes; return the exit code. Collective."""
    from llama_ds.parallel import world

    heartbeat = Heartbeat(REQUESTS)
    with world.failing_together(heartbeat.tell, REQUESTS.close_outputs) as end:
        rank_info = world.find_rank_info()
        log.setup(quiet=rank_info.rank != 0)
        job = current(os.environ)
        if job:
            if job.launcher in MPI_LAUNCHERS:
                world.check_mpi(rank_info)
            check_world(job, rank_info.rank, rank_info.world)
            keep_output(job, rank_info.rank)
            os.environ.update(job.secrets())
            heartbeat.begin(job, rank_info.rank, can_leave=not world.on_cuda())
        # Join first: a mistake that only one rank detects, such as a file missing on its node, must reach the others.
        if rank_info.world > 1:
            REQUESTS.enter(Stage.JOINING)
        world.join(rank_info, job.nic if job else "", job.rank_hosts if job else ())
        if rank_info.world > 1:
            REQUESTS.keep()
        if job:
            check_hosts(job, world.gather(host_identity()))
        run, layout, config = world.together(lambda: resolve(arguments, rank_info.world))
        if arguments.self_test:
            only_self_test(run, layout, config, rank_info)
        else:
            end.code = train_until_asked(run, layout, config, rank_info, heartbeat)
        REQUESTS.enter(Stage.FINISHED)
        heartbeat.end()
    return end.code


def train_until_asked(
    run: RunConfig, layout: Layout, config: dict[str, Any], rank_info: RankInfo, heartbeat: Heartbeat
) -> int:
    """Train to the last step, or until the run is asked to end; return the exit code. Collective.

    Raises:
        UserError: on all ranks: another job trains the run, no time is left, or as `train`.
    """
    from llama_ds.parallel import world
    from llama_ds.training.interruptions import EndedEarly, check_time_left
    from llama_ds.training.loop import train
    from llama_ds.training.run_in_use import locked

    gc.enable()
    heartbeat.progress.enter(Phase.LOADING)

    def check() -> None:
        check_time_left(run.checkpoint)
        check_packages(run.path, run.logging.boards if rank_info.rank == 0 else ())

    world.together(check)
    try:
        with locked(run.run_dir, rank_info) as check_lock:
            ended = train(run, layout, config, rank_info, heartbeat.progress, REQUESTS, check_lock)
    except EndedEarly as early:
        log.logger.info("ended before the first step (%s); there was nothing to save", early)
        of_launcher = current(os.environ) is not None
        return INTERRUPTED if early.request is Request.INTERRUPT else 0 if of_launcher else TERMINATED
    return INTERRUPTED if ended is Request.INTERRUPT else 0


def describe(arguments: argparse.Namespace) -> None:
    """Print the plan of --dry-run."""
    from llama_ds.layout.recompute import with_device_memory
    from llama_ds.parallel import world
    from llama_ds.training.plan import describe_stages

    run, _, config = resolve(arguments, arguments.world or 1)
    check_packages(run.path, run.logging.boards)
    run = with_device_memory(run, world.device_memory(world.device()))
    print(describe_stages(run, arguments.world or 1, config))


def resolve(arguments: argparse.Namespace, ranks: int) -> tuple[RunConfig, Layout, dict[str, Any]]:
    """Return the run, its layout on `ranks` ranks and the merged DeepSpeed configuration."""
    from llama_ds.parallel import world

    check_launcher_hostfile()
    strict = ["checkpoint.strict=true"] if arguments.strict else []
    run = load_run(arguments.run_file, [*arguments.overrides, *strict])
    layout = resolve_layout(run, ranks)
    return run, layout, deepspeed_config(run, layout, world.computes_bf16(world.device()))


def only_self_test(run: RunConfig, layout: Layout, config: dict[str, Any], rank_info: RankInfo) -> None:
    """Test the layout without the run's data, of which only document masks need the tokenizer. Collective."""
    from llama_ds.data.text.tokenizer import Tokenizer
    from llama_ds.parallel import world
    from llama_ds.training.self_test.check import self_test
    from llama_ds.training.setup import with_min_memory

    gc.enable()
    device, dtype = world.device(), "bf16" if config["bf16"]["enabled"] else "fp32"
    path = run.data.tokenizer
    marks = world.together(lambda: Tokenizer(path).marks if run.data.document_mask else LLAMA_MARKS)
    self_test(with_min_memory(run, device), layout, dtype, marks, rank_info, device)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; DeepSpeed's launcher adds --local_rank, which the environment also contains."""
    parser = argparse.ArgumentParser(
        description="Train a LLaMA on DeepSpeed.",
        epilog=as_typed(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        fromfile_prefix_chars="@",  # tools/launch.py passes arguments in a file, so that no user input reaches a shell
    )
    parser.add_argument("run_file", help="YAML run file, e.g. ds_configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, e.g. parallel.pp=2")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="print the resolved plan and exit")
    instead.add_argument(
        "--self-test", action="store_true", help="test the layout with a tiny model against plain torch, and exit"
    )
    parser.add_argument("--strict", action="store_true", help="end at a damaged checkpoint: checkpoint.strict=true")
    parser.add_argument("--world", type=whole(1, 10**7), help="with --dry-run: the number of ranks to plan for")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.world is not None and not arguments.dry_run:
        raise UserError(f"--world {arguments.world} is for --dry-run: the launcher counts the ranks; leave it out")
    return arguments


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
