"""Calls of every tool: a small one that succeeds, and one that blocks on an input that never arrives.

Names in braces are filled in by `conftest.py`: a finished run with a trace, its data, and `waits`, a folder in which
pipes replace files.
"""

from __future__ import annotations

NORMAL = {
    "benchmark.py": "layer --batch 1 --seq-len 16 --threads 1 --repeats 1 --device cpu --json",
    "cluster_scale.py": "hostfiles/2x8 --pp 2 --tp 8 --seconds 0.2 --beat-s 0.1 --json",
    "convert.py": "{run} {new}/hf --to hf",
    "dryrun.py": "{run_file} model.num_hidden_layers=1 --world 2 --rank all-distinct --backend gloo --json",
    "evaluate.py": "{run} --json",
    "generate.py": "{run} --max-new-tokens 4 --json",
    "hostfile.py": "map hostfiles/2x8 --tp 4 --json",
    "ladder.py": "plan {ladder} --json",
    "launch.py": "{run_file} --hostfile hostfiles/local --dry-run",
    "plan.py": "estimate 7b --gpus 8 --json",
    "preflight.py": "--hostfile hostfiles/local --no-measure --json",
    "profile_run.py": "analyse {run}/trace --merge --json",
    "report.py": "{run} --out {new}/report.html --json",
    "shards.py": "verify {shards} --json",
    "tokenizer.py": "encode --model {tokenizer} text",
}
# These start ranks; their own tests check their output with `tests/console.py`.
WITH_RANKS = ("machine.py", "pipeline.py", "quickstart.py")

WAITING = {
    "benchmark.py": "step --run {waits}/pipe.yaml",
    "cluster_scale.py": "{waits}/pipe.yaml",
    "convert.py": "{waits}/step_00000001 {new}/hf --to hf",
    "dryrun.py": "{waits}/pipe.yaml --world 2",
    "evaluate.py": "{waits}/step_00000001",
    "generate.py": "{waits}/step_00000001",
    "hostfile.py": "check {waits}/pipe.yaml",
    "ladder.py": "plan {waits}/pipe.yaml",
    "launch.py": "{waits}/pipe.yaml --hostfile hostfiles/local",
    "machine.py": "gemm --cluster {new}/here.yaml --run {waits}/pipe.yaml",
    "pipeline.py": "--run {waits}/pipe.yaml",
    "plan.py": "estimate {waits}/pipe.yaml --gpus 8",
    "preflight.py": "--hostfile {waits}/pipe.yaml",
    "profile_run.py": "record {waits}/pipe.yaml",
    "quickstart.py": "data.tokenizer={waits}/pipe.yaml "
    "data.sources.0.path={waits}/source data.sources.1.path={waits}/source",
    "report.py": "{waits}/run",
    "shards.py": "info {waits}/source",
    "tokenizer.py": "encode --model {waits}/pipe.yaml text",
}
