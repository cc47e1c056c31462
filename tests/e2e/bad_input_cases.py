"""The mistakes that end a run: what each damages, how its ranks start, and what the error must name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tiny_run import Corpus, Run

from llama_ds.data.text.tokenizer import train_tokenizer


@dataclass(frozen=True)
class Site:
    """A case's own copies: a corpus and a finished run of two pipeline stages, to damage."""

    root: Path
    corpus: Corpus
    run: Run

    @property
    def arguments(self) -> list[str]:
        """The valid command line."""
        return [str(self.run.file)]

    def shard(self, number: int) -> Path:
        """A shard of the training rows."""
        return self.corpus.shards / "code" / f"train-{number:06d}.tar"

    @property
    def optimizer_file(self) -> Path:
        """A file of the newest checkpoint that only one rank reads."""
        return sorted(self.run.newest.glob("zero_pp_rank_0_mp_rank_01_optim_states.pt"))[0]


@dataclass(frozen=True)
class Case:
    """`prepare` damages the site and returns the command line, in which {rank} stands for the rank that reads it."""

    name: str
    prepare: Callable[[Site], list[str]]
    words: tuple[str, ...]  # expected in the error message
    trained: bool = False  # the site's run has a checkpoint

    def __str__(self) -> str:
        return self.name


def overriding(*overrides: str) -> Callable[[Site], list[str]]:
    """Return the preparation that damages nothing but adds overrides."""
    return lambda site: [*site.arguments, *overrides]


def unknown_key(site: Site) -> list[str]:
    text = site.run.file.read_text().replace("hidden_size:", "hiden_size:")
    site.run.file.write_text(text)
    return site.arguments


def other_tokenizer(site: Site) -> list[str]:
    """Damage a file without changing its size, so that only the content differs."""
    vocab_size = 384
    train_tokenizer([str(site.corpus.shards.parent / "code")], str(site.root / "other"), vocab_size)
    return [*site.arguments, f"data.tokenizer={site.root / 'other.model'}"]


def tokenizer_is_text(site: Site) -> list[str]:
    site.corpus.tokenizer.write_text("not a model")
    return site.arguments


def shard_cut_short(site: Site) -> list[str]:
    os.truncate(site.shard(2), 10_000)
    return [*site.arguments, "data.max_bad_shards=0"]


def shard_missing(site: Site) -> list[str]:
    site.shard(2).unlink()
    return site.arguments


def shard_damaged(site: Site) -> list[str]:
    """Damage a file of full size, which only the checksum detects, read by the ranks of dp = 2."""
    for number in range(16):
        if number != 3 and site.shard(number).exists():
            site.shard(number).write_bytes(bytes(site.shard(number).stat().st_size))
    return [*site.arguments, "parallel.pp=1", "data.max_bad_shards=3"]


def remote_missing(site: Site) -> list[str]:
    override = "data.sources.0.path=http://127.0.0.1:9/code"
    return [*site.arguments, override, f"data.cache_dir={site.root}/cache", "data.deadline_s=1"]


def cache_too_small(site: Site) -> list[str]:
    override = f"data.sources.0.path=pipe:cat {site.corpus.shards}/code/{{}}"
    return [*site.arguments, override, f"data.cache_dir={site.root}/cache", "data.cache_gib=1e-6"]


def description_edited(site: Site) -> list[str]:
    """Change a number, as a user or a bad disk might."""
    description = site.run.newest / "llama_ds.json"
    found = json.loads(description.read_text())
    found["tokens"] += 1
    description.write_text(json.dumps(found))
    return site.arguments


def checkpoint_of_before(site: Site) -> list[str]:
    """Imitate a version without checksums."""
    description = site.run.newest / "llama_ds.json"
    found = json.loads(description.read_text())
    del found["format"], found["checksum"]
    description.write_text(json.dumps(found))
    return site.arguments


def checkpoint_loops(site: Site) -> list[str]:
    file = site.optimizer_file
    file.unlink()
    file.symlink_to(file.name)
    return site.arguments


def shards_on_one_rank(site: Site) -> list[str]:
    """Hide the files from rank 1's node."""
    (site.root / "node0").symlink_to(site.corpus.shards / "code")
    return [*site.arguments, f"data.sources.0.path={site.root}/node{{rank}}"]


def folder_of_its_own(site: Site) -> list[str]:
    """Give every node a local folder with the same path."""
    return [*site.arguments, f"output_dir={site.root}/node{{rank}}"]


def run_file_on_one_rank(site: Site) -> list[str]:
    (site.root / "node0.yaml").write_bytes(site.run.file.read_bytes())
    return [f"{site.root}/node{{rank}}.yaml"]


def checkpoint_cut_short(site: Site) -> list[str]:
    os.truncate(site.optimizer_file, 1000)
    return site.arguments


def checkpoint_file_missing(site: Site) -> list[str]:
    site.optimizer_file.unlink()
    return site.arguments


def checkpoint_overwritten(site: Site) -> list[str]:
    """Damage a file of full size, which only the checksum detects."""
    site.optimizer_file.write_bytes(bytes(site.optimizer_file.stat().st_size))
    return site.arguments


def checkpoint_gone(site: Site) -> list[str]:
    (site.run.newest / "llama_ds.json").unlink()
    return site.arguments


def other_shape(site: Site) -> list[str]:
    return [*site.arguments, f"checkpoint.start_from={site.run.dir}", "name=other", "model.intermediate_size=96"]


def run_folder_is_a_file(site: Site) -> list[str]:
    site.run.dir.rmdir()
    site.run.dir.write_text("")
    return site.arguments


CASES = [
    Case("missing run file", lambda site: [str(site.root / "nowhere.yaml")], ("nowhere.yaml",)),
    Case("run file on one rank", run_file_on_one_rank, ("node1.yaml",)),
    Case("unknown key", unknown_key, ("hiden_size", "did you mean 'hidden_size'")),
    Case("unknown override", overriding("optimizer.lrr=1"), ("optimizer.lrr",)),
    Case("override without a value", overriding("optimizer.lr"), ("'optimizer.lr' is not an override",)),
    Case("global batch for dp", overriding("parallel.pp=1", "training.global_batch=7"), ("global_batch = 7", "6 or 8")),
    Case("global batch for micro", overriding("training.global_batch=7"), ("micro_batch = 2 does not divide 7",)),
    Case("evaluation rows", overriding("evaluation.rows=7"), ("evaluation.rows = 7", "6 or 8")),
    Case("other tokenizer", other_tokenizer, ("other.model", "built with tokenizer")),
    Case("missing tokenizer", overriding("data.tokenizer=nowhere.model"), ("nowhere.model",)),
    Case("tokenizer is text", tokenizer_is_text, ("tokenizer.model", "not a sentencepiece model")),
    Case("shard cut short", shard_cut_short, ("train-000002.tar", "10000 bytes", "data.max_bad_shards = 0")),
    Case("shard missing", shard_missing, ("train-000002.tar", "is missing")),
    Case("shards damaged", shard_damaged, ("shards are damaged", "step 0, code, shard ", "sha256")),
    Case("shards on one rank", shards_on_one_rank, ("node1",)),
    Case("folder not shared", folder_of_its_own, ("node1/site/checkpoints", "rank 1 on host", "share")),
    Case("unknown kind of place", overriding("data.sources.0.path=foo://bar/baz"), ("foo://bar/baz", "s3://")),
    Case("remote without a cache", overriding("data.sources.0.path=http://127.0.0.1:9/x"), ("data.cache_dir",)),
    Case("pipe without a name", overriding("data.sources.0.path=pipe:cat"), ("pipe:cat", "{}")),
    Case("remote that is not there", remote_missing, ("manifest.json", "refused")),
    Case("cache too small", cache_too_small, ("data.cache_gib",)),
    Case("description edited", description_edited, ("llama_ds.json", "checksum does not match"), trained=True),
    Case("checkpoint of before", checkpoint_of_before, ("checkpoint format 1",), trained=True),
    Case("checkpoint loops", checkpoint_loops, ("optim_states.pt", "symbolic links"), trained=True),
    Case("other batch", overriding("training.global_batch=16"), ("training.global_batch 8, not 16",), trained=True),
    Case("nothing to resume", overriding("checkpoint.resume=must"), ("no checkpoint to resume from",)),
    Case("not to resume", overriding("checkpoint.resume=never"), ("checkpoint.resume = never",), trained=True),
    Case("checkpoint cut short", checkpoint_cut_short, ("optim_states.pt", "is 1000 bytes"), trained=True),
    Case("checkpoint file missing", checkpoint_file_missing, ("optim_states.pt", "is missing"), trained=True),
    Case("checkpoint overwritten", checkpoint_overwritten, ("optim_states.pt", "have checksum"), trained=True),
    Case("checkpoint gone", checkpoint_gone, ("step_00000006", "no llama_ds.json"), trained=True),
    Case("nothing to start from", overriding("checkpoint.start_from=nowhere"), ("nowhere", "no such folder")),
    Case(
        "start from another shape",
        other_shape,
        ("model.intermediate_size = 88 there, 96 here", "model='{from: "),
        trained=True,
    ),
    Case("other model", overriding("model.intermediate_size=96"), ("intermediate_size 88, not 96",), trained=True),
    Case(
        "matrices too large",
        overriding("optimizer.name=muon", "model.hidden_size=65536", "model.intermediate_size=262144"),
        ("optimizer.name = muon", "stage ", "cannot hold whole matrices", "GiB of a rank", "the device has", "; use "),
    ),
    Case("run folder is a file", run_folder_is_a_file, ("cannot write",)),
    Case("divergence", overriding("optimizer.lr=1e38", "optimizer.warmup_steps=0"), ("diverged", "optimizer.lr")),
]
