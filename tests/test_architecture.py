"""The import rules of ARCHITECTURE.md, checked on the syntax trees of llama_ds/ and tools/."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

# Lowest first. A room may import itself and rooms on lower floors, but not other rooms on its own floor.
FLOORS = (
    ("errors", "machine", "child_processes", "shipped", "atomic_files"),
    ("log",),
    ("command_line",),
    ("schedules",),
    ("config",),
    ("layout",),
    ("job",),
    ("model", "perf"),
    ("parallel", "checkpoint", "data"),
    ("evaluation",),
    ("training",),
    ("launch",),
    ("benchmarks", "experiments"),
    ("train", "standby", "tools"),
    ("__main__",),
)

# Heavy packages and os.replace, and the only files that may import or name them (in fnmatch, * also crosses folders).
DOORS = {
    "datasets": ("llama_ds/benchmarks/data/rivals.py", "llama_ds/evaluation/harness_protocol.py"),
    "deepspeed": ("llama_ds/parallel/*", "llama_ds/training/engines/*.py"),
    "fsspec": ("llama_ds/data/source/remote.py",),
    "flash_attn": ("llama_ds/model/attention*.py",),
    "gguf": ("llama_ds/checkpoint/formats/gguf_*.py", "llama_ds/benchmarks/gguf_tokenizer.py"),
    "lm_eval": (
        "llama_ds/evaluation/lm_eval_model.py",
        "llama_ds/evaluation/harness_protocol.py",
        "llama_ds/benchmarks/evaluation_speed.py",
    ),
    "matplotlib": ("llama_ds/experiments/ladder/figures.py",),
    "os.replace": ("llama_ds/atomic_files.py", "llama_ds/data/source/cache.py"),
    "orjson": ("llama_ds/data/text/piece_reader.py",),
    "pyarrow": ("llama_ds/data/text/columns.py", "llama_ds/evaluation/fetch.py"),
    "scipy": ("llama_ds/experiments/ladder/law.py",),
    "sentencepiece": ("llama_ds/data/text/sentencepiece_model.py",),
    "streaming": ("llama_ds/benchmarks/data/rivals.py",),
    "tiktoken": ("llama_ds/data/text/tiktoken_ranks.py",),
    "torch.distributed": ("llama_ds/parallel/*", "llama_ds/checkpoint/formats/dcp_writing.py"),
    "transformers": ("llama_ds/benchmarks/*", "tools/*"),
    "webdataset": ("llama_ds/data/*", "llama_ds/benchmarks/data/*"),
    "xxhash": (
        "llama_ds/checkpoint/*",
        "llama_ds/data/text/mds.py",
        "llama_ds/job/memory_slots.py",
    ),
    "yaml": ("llama_ds/config/*",),
    "zstandard": ("llama_ds/data/text/decompress.py",),
}

# Variables that launchers set to identify a rank, and the only files that may read them.
RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("OMPI_COMM_WORLD_*", "PMI_RANK", "PMI_SIZE", "PMIX_RANK", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
)
# The second knows before torch is imported whether this is the first rank, which alone says why a run ends.
RANK_READERS = ("llama_ds/parallel/*", "llama_ds/job/requests.py")

# Arithmetic and text, usable on a login node without torch.
TORCH_FREE = (
    *("llama_ds/errors.py", "llama_ds/log.py", "llama_ds/machine.py", "llama_ds/child_processes.py"),
    *("llama_ds/shipped.py", "llama_ds/command_line.py", "llama_ds/config/*", "llama_ds/layout/*"),
    *("llama_ds/atomic_files.py", "llama_ds/schedules/*", "llama_ds/job/*", "llama_ds/launch/*", "llama_ds/perf/*"),
    *("llama_ds/data/order.py", "llama_ds/data/mixture.py", "llama_ds/data/text/*", "llama_ds/data/building/*"),
    "llama_ds/training/lr_schedule.py",
)

VAGUE_NAMES = ("utils.py", "common.py", "helpers.py", "manager.py")
MAX_LINES = 400  # limit for a file in llama_ds

FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def source_files() -> list[str]:
    """Paths of the Python files under the rules, relative to the repository."""
    files = [p for top in ("llama_ds", "tools") for p in (REPO / top).rglob("*.py")]
    return sorted(p.relative_to(REPO).as_posix() for p in files)


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def room_of(module: str) -> str | None:
    """Room of a dotted name: "llama_ds.config.schema" -> "config"; None for other packages and llama_ds itself."""
    top, _, rest = module.partition(".")
    if top == "tools":
        return "tools"
    return rest.partition(".")[0] or None if top == "llama_ds" else None


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


class Names(ast.NodeVisitor):
    """Collects the (line, dotted name) pairs that a file imports or uses, with aliases (`import a.b as c`) resolved."""

    def __init__(self, path: str, tree: ast.Module) -> None:
        package = module_of(path) if path.endswith("__init__.py") else module_of(path).rpartition(".")[0]
        self.package = package.split(".")
        self.alias: dict[str, str] = {}
        self.imported: list[tuple[int, str]] = []
        self.used: list[tuple[int, str]] = []
        self.rank_variables: list[tuple[int, str]] = []
        for node in ast.walk(tree):  # aliases first, because a use may precede a late import
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.read_import(node)
        self.visit(tree)

    def read_import(self, node: ast.Import | ast.ImportFrom) -> None:
        base = ""
        if isinstance(node, ast.ImportFrom):
            above = self.package[: len(self.package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])]) + "."
        for item in node.names:
            name = base.rstrip(".") if item.name == "*" else base + item.name
            self.imported.append((node.lineno, name))
            if base or item.asname:
                self.alias[item.asname or item.name] = name

    def dotted(self, node: ast.expr) -> str:
        """Dotted name of `a.b.c`, aliases resolved; "" for any other expression."""
        if isinstance(node, ast.Name):
            return self.alias.get(node.id, node.id)
        if isinstance(node, ast.Attribute) and (value := self.dotted(node.value)):
            return f"{value}.{node.attr}"
        return ""

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.used.append((node.lineno, self.dotted(node)))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """`os.environ.get("RANK")`, `os.getenv("RANK")`; import_module and find_spec count as imports."""
        function = self.dotted(node.func)
        if function == "os.getenv" or is_within(function, "os.environ"):
            self.read_variables(node)
        if function.rpartition(".")[2] in ("import_module", "find_spec", "__import__"):
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            self.imported += [(node.lineno, text) for text in texts]
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        """`os.environ["RANK"]`"""
        if self.dotted(node.value) == "os.environ":
            self.read_variables(node)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        """`"RANK" in os.environ`"""
        if any(self.dotted(comparator) == "os.environ" for comparator in node.comparators):
            self.read_variables(node)
        self.generic_visit(node)

    def read_variables(self, expression: ast.expr) -> None:
        for node in ast.walk(expression):
            word = node.value if isinstance(node, ast.Constant) else node.arg if isinstance(node, ast.keyword) else None
            if isinstance(word, str) and matches(word, RANK_VARIABLES):
                self.rank_variables.append((expression.lineno, word))


def floor_violations(path: str, names: Names) -> Iterator[tuple[int, str]]:
    here = room_of(module_of(path))
    if here is None:  # llama_ds/__init__.py
        yield from ((n, f"llama_ds/__init__.py imports {m}; it stays empty") for n, m in names.imported)
        return
    if here not in FLOOR_OF:
        yield 1, f"room '{here}' has no floor; add it to FLOORS"
        return
    for line, module in names.imported:
        there = room_of(module)
        if there is None or there == here or module == "llama_ds.__version__":
            continue
        if there not in FLOOR_OF:
            yield line, f"imports {module}: room '{there}' has no floor in FLOORS"
        elif FLOOR_OF[there] >= FLOOR_OF[here]:
            way = "sideways" if FLOOR_OF[there] == FLOOR_OF[here] else "up"
            yield line, f"imports {module}, which points {way} from {here}; imports point down only"


def door_violations(path: str, names: Names) -> Iterator[tuple[int, str]]:
    for package, doors in DOORS.items():
        if not matches(path, doors):
            lines = {line for line, name in names.imported + names.used if is_within(name, package)}
            yield from ((line, f"uses {package}: allowed only in {', '.join(doors)}") for line in lines)
    if not matches(path, RANK_READERS):
        for line, variable in names.rank_variables:
            yield line, f"reads the environment variable {variable}: allowed only in {', '.join(RANK_READERS)}"
    if matches(path, TORCH_FREE):
        lines = {line for line, name in names.imported if is_within(name, "torch")}
        yield from ((line, "imports torch: this file must work without it") for line in lines)


def file_violations(path: str, source: str) -> Iterator[tuple[int, str]]:
    folder, _, name = path.rpartition("/")
    if name in VAGUE_NAMES:
        yield 1, f"is called {name}: name the file after what it holds"
    if folder in ("tools", "llama_ds") and name.removesuffix(".py") in sys.stdlib_module_names:
        yield 1, f"shadows the standard library's {name.removesuffix('.py')} when a script of its folder runs"
    lines = source.count("\n")
    if path.startswith("llama_ds/") and lines > MAX_LINES:
        yield lines, f"has {lines} lines; split it at {MAX_LINES}"


def violations(path: str, source: str) -> list[str]:
    """Broken rules of one file, each as "file:line: rule"."""
    names = Names(path, ast.parse(source, path))
    found = [
        *floor_violations(path, names),
        *door_violations(path, names),
        *file_violations(path, source),
    ]
    return [f"{path}:{line}: {rule}" for line, rule in sorted(found)]


@pytest.mark.parametrize("path", source_files())
def test_file_keeps_the_rules(path: str) -> None:
    broken = violations(path, (REPO / path).read_text(encoding="utf-8"))
    assert not broken, "\n" + "\n".join(broken)


def test_every_room_is_a_package() -> None:
    """A folder without __init__.py would be missing from an installed llama_ds."""
    folders = {(REPO / path).parent for path in source_files() if path.startswith("llama_ds/")}
    assert [f for f in folders if not (f / "__init__.py").exists()] == []


def test_torch_free_files_load_without_torch() -> None:
    """This finds what the syntax tree does not show: an import of torch through another module or an __init__."""
    modules = [module_of(path) for path in source_files() if matches(path, TORCH_FREE)]
    program = "import importlib, sys; sys.modules['torch'] = None\nfor m in sys.argv[1:]: importlib.import_module(m)"
    done = subprocess.run([sys.executable, "-c", program, *modules], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("path", "source", "line", "rule"),
    [
        ("llama_ds/model/layer.py", "import os\nfrom llama_ds.training import loop", 2, "points up"),
        ("llama_ds/data/stream.py", "def f():\n    from ..parallel import grid", 2, "points sideways"),
        ("llama_ds/data/stream.py", "from .. import checkpoint", 1, "points sideways"),
        ("llama_ds/config/run.py", "import llama_ds.launch.hostfile", 1, "points up"),
        ("llama_ds/training/loop.py", "from llama_ds.launch import hostfile", 1, "points up"),
        ("llama_ds/perf/plan.py", "from llama_ds.parallel import world", 1, "points up"),
        ("llama_ds/training/loop.py", "from tools import shards", 1, "points up"),
        ("llama_ds/attic/old.py", "", 1, "no floor"),
        ("llama_ds/__init__.py", "from llama_ds import log", 1, "stays empty"),
        ("llama_ds/training/loop.py", "import deepspeed.comm as dist", 1, "uses deepspeed"),
        ("tools/bench.py", "from torch import distributed as dist", 1, "uses torch.distributed"),
        ("llama_ds/model/head.py", "import torch as t\nt.distributed.barrier()", 2, "uses torch.distributed"),
        ("llama_ds/model/layer.py", "import importlib\nimportlib.import_module('flash_attn.cute')", 2, "flash_attn"),
        ("llama_ds/training/loop.py", "from yaml import safe_load", 1, "uses yaml"),
        ("llama_ds/data/source/shards.py", "import sentencepiece", 1, "uses sentencepiece"),
        ("llama_ds/training/boards/page.py", "import os\nos.replace('page.tmp', 'page')", 2, "uses os.replace"),
        ("llama_ds/checkpoint/hf.py", "from transformers import LlamaConfig", 1, "uses transformers"),
        ("llama_ds/train.py", "import os\nos.environ['RANK']", 2, "environment variable RANK"),
        ("llama_ds/train.py", "from os import environ\nenviron.get('LOCAL_RANK', 0)", 2, "variable LOCAL_RANK"),
        ("llama_ds/data/stream.py", "import os\nos.getenv('OMPI_COMM_WORLD_SIZE')", 2, "variable OMPI_COMM_WORLD_SIZE"),
        ("tools/bench.py", "import os\n'WORLD_SIZE' in os.environ", 2, "variable WORLD_SIZE"),
        ("tools/bench.py", "import os\nos.environ.update(MASTER_ADDR='x')", 2, "variable MASTER_ADDR"),
        ("llama_ds/launch/preflight.py", "import torch", 1, "imports torch"),
        ("llama_ds/data/order.py", "from torch import nn", 1, "imports torch"),
        ("tools/profile.py", "", 1, "shadows the standard library's profile"),
        ("llama_ds/model/utils.py", "", 1, "name the file"),
        ("llama_ds/model/layer.py", "\n" * 401, 401, "split it"),
    ],
)
def test_broken_rule_is_caught(path: str, source: str, line: int, rule: str) -> None:
    (message,) = violations(path, source)
    assert message.startswith(f"{path}:{line}: ") and rule in message


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "llama_ds/training/engines/build.py",
            "import deepspeed\nfrom llama_ds.parallel import grid\nfrom ... import log",
        ),
        ("llama_ds/parallel/process.py", "import os\nimport torch.distributed as dist\nos.environ['RANK']"),
        ("llama_ds/launch/argv.py", "import os\nenv = {**os.environ, 'MASTER_ADDR': 'node0'}\nos.environ['HOME']"),
        ("llama_ds/model/layer.py", "import torch\nfrom . import rope\nfrom llama_ds.config.schema import ModelConfig"),
        (
            "tools/convert.py",
            "import transformers\nfrom llama_ds import __version__\nfrom llama_ds.checkpoint import hf",
        ),
    ],
)
def test_allowed_code_passes(path: str, source: str) -> None:
    assert violations(path, source) == []
