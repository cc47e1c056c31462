"""A conversion resumes after a kill or a full disk; a destination is complete or absent; sources are never changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from written_ranks import MODEL, SHAPES, Write

from llama_ds.checkpoint.conversion import proof
from llama_ds.checkpoint.conversion.partial import JOURNAL, Partial, cannot_write
from llama_ds.checkpoint.formats.huggingface import plan_huggingface
from llama_ds.checkpoint.formats.plan import Plan, Target
from llama_ds.checkpoint.load_model import open_model
from llama_ds.checkpoint.weights import ModelFiles
from llama_ds.errors import UserError
from tools import convert

ROOT = Path(__file__).resolve().parents[2]
WIDE = replace(MODEL, hidden_size=512, intermediate_size=1024, num_hidden_layers=8, head_dim=128, rope_scaling=None)


class Noise:
    """A weight that is generated when it is read; no file holds it."""

    dtype = torch.float32
    paths: frozenset[str] = frozenset()

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        self.shape, self._seed = shape, seed

    def whole(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(self._seed)).to(dtype or self.dtype)

    def read(self, out: torch.Tensor, rank: int = 0, size: int = 1, start: int = 0) -> None:
        out.view(-1).copy_(self.whole().view(-1)[start : start + out.numel()])


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of 100 MB."""
    from llama_ds.checkpoint.conversion.convert import Options, convert
    from llama_ds.layout.weights import weight_shapes

    folder = tmp_path_factory.mktemp("wide")
    tensors = {key: Noise(shape, i) for i, (key, shape) in enumerate(weight_shapes(WIDE).items())}
    files = ModelFiles(str(folder), WIDE, 64, "fp32", tensors, None)
    plan: Plan = plan_huggingface(files, Target("fp32"), None)
    convert(files, plan, str(folder / "hf"), Options(), lambda folder: None)
    return folder / "hf"


def command(source: Path, destination: Path) -> list[str]:
    tool = [sys.executable, str(ROOT / "tools" / "convert.py"), str(source), str(destination)]
    return [*tool, "--to", "deepspeed", "--tp", "2", "--workers", "1", "--no-logits"]


def finished(partial: Path) -> list[str]:
    try:
        lines = (partial / JOURNAL).read_text().splitlines()[1:]
    except FileNotFoundError:
        return []
    return [json.loads(line)["file"] for line in lines if line.endswith("}")]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.slow
def test_a_killed_conversion_resumes(wide: Path, tmp_path: Path) -> None:
    plain, out = tmp_path / "plain", tmp_path / "out"
    assert subprocess.run(command(wide, plain), capture_output=True).returncode == 0
    partial = tmp_path / "out.partial"
    kept: dict[str, tuple[int, int]] = {}
    for wanted in (5, 12):  # the second kill hits the resumed conversion
        process = subprocess.Popen(command(wide, out), stdout=subprocess.DEVNULL)
        while len(finished(partial)) < wanted:
            assert process.poll() is None, "the conversion ended before the kill"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists() and (partial / JOURNAL).exists()
        for name, identity in kept.items():
            assert inode_and_time(partial / name) == identity
        kept = {name: inode_and_time(partial / name) for name in finished(partial)}
        assert wanted <= len(kept) < 2 * 11 + 2
    done = subprocess.run(command(wide, out), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {name: inode_and_time(out / name) for name in kept} == kept
    assert contents(out) == contents(plain)
    assert sorted(os.listdir(tmp_path)) == ["out", "plain"]


def inode_and_time(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def small(write: Write, kind: str = "deepspeed") -> list[str]:
    return [write(1, True, model=SHAPES["gqa"]), "--to", kind, "--no-logits"]


def test_the_working_folder_of_another_conversion_is_not_resumed(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, *words = small(write)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    (tmp_path / "out.partial").mkdir()
    (partial / "mine").touch()  # it might be a folder of the user with the same name
    for _ in range(2):
        assert convert.main([source, str(out), *words]) == 2
        assert f"{partial}: was left by a conversion of another source" in capsys.readouterr().err
        assert (partial / "mine").exists() and not out.exists()
        (partial / JOURNAL).write_text('{"fingerprint": "another"}\n')
    assert convert.main([source, str(out), *words, "--overwrite"]) == 0
    assert not partial.exists() and not (out / "mine").exists()


def test_a_truncated_journal_counts_up_to_its_last_complete_line(tmp_path: Path) -> None:
    """A power failure can leave an incomplete line, and a finished file whose name is not on the disk."""
    out = tmp_path / "out"
    with Partial(str(out), "same", False) as work:
        for name in "abc":
            (tmp_path / "out.partial" / name).write_text(name)
            work.finish(name, f"sum of {name}")
    journal = tmp_path / "out.partial" / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-5])
    (tmp_path / "out.partial" / "b").unlink()
    with Partial(str(out), "same", False) as work:
        assert work.finished == {"a": "sum of a"}
        with pytest.raises(UserError, match="another conversion is writing it now"):
            Partial(str(out), "same", False)
        work.finish("c", "new sum")
    with Partial(str(out), "same", False) as work:
        assert work.finished == {"a": "sum of a", "c": "new sum"}
        work.commit()
    assert sorted(os.listdir(out)) == ["a", "c"]


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_an_existing_destination_is_replaced_only_when_told(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    source, *words = small(write, "hf")
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "old").touch()
    if what == "folder":
        out.mkdir()
        (out / "old").touch()
    elif what == "file":
        out.touch()
    else:
        out.symlink_to(elsewhere)
    before = out.lstat().st_ctime_ns
    assert convert.main([source, str(out), *words]) == 2
    assert capsys.readouterr().err == f"error: {out}: exists already; give another folder or --overwrite\n"
    assert out.lstat().st_ctime_ns == before
    assert convert.main([source, f"{out}/", *words, "--overwrite"]) == 0
    assert (out / "model.safetensors").exists() and not (out / "old").exists() and not out.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "out", "run"]
    assert os.listdir(elsewhere) == ["old"]


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/step_00000007"])
def test_the_source_is_not_replaced(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    source, *words = small(write, "hf")
    before = contents(Path(source) / "checkpoints" / "step_00000007")
    (tmp_path / "link").symlink_to(source)
    for start in (source, str(tmp_path / "link")):
        assert convert.main([source, f"{start}/{where}", *words, "--overwrite"]) == 2
        assert "holds the source" in capsys.readouterr().err
    assert contents(Path(source) / "checkpoints" / "step_00000007") == before
    assert convert.main([source, f"{source}/hf", *words]) == 0  # beside the checkpoints
    inside = contents(Path(source) / "hf")
    for name in ("model.safetensors", "config.json", "tokenizer.model"):
        assert convert.main([f"{source}/hf", f"{source}/hf/{name}", *words, "--overwrite"]) == 2
        assert "of the source " in capsys.readouterr().err or name != "config.json"
    assert contents(Path(source) / "hf") == inside


def test_a_failed_proof_leaves_no_destination(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, *words = small(write, "hf")
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    prove = proof.prove

    def bit_flipped(*args: object, **kwargs: object) -> object:
        with open(partial / "model.safetensors", "r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(b"\xff")
        return prove(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(proof, "prove", bit_flipped)  # simulates a faulty disk
        assert convert.main([source, str(out), *words]) == 2
    wanted = f"{partial}: 5.lm_head.weight differs from that of {source}/checkpoints/step_00000007"
    assert wanted in capsys.readouterr().err
    assert partial.exists() and not out.exists()
    assert convert.main([source, str(out), *words]) == 2  # the next conversion does not resume in the bad folder
    assert convert.main([source, str(out), *words, "--overwrite"]) == 0


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=100m", "llama_ds-test", str(disk)]
    if os.geteuid() or subprocess.run(options, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def test_a_full_disk_is_reported_and_the_conversion_resumes(
    write: Write, tmp_path: Path, mount: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, *words = small(write)
    out = mount / "start"
    remount(mount, "size=100k")
    assert convert.main([source, str(out), *words]) == 2
    assert f"{out}.partial: needs 0.00 GB more and the disk has 0.00 GB left" in capsys.readouterr().err
    remount(mount, "size=360k")  # enough for the tensor data, but not for the overhead of the files
    assert convert.main([source, str(out), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {out}.partial: cannot be written (No space left on device); free space")
    assert error.count("\n") == 1 and not out.exists()
    kept = {name: inode_and_time(mount / "start.partial" / name) for name in finished(mount / "start.partial")}
    assert kept
    remount(mount, "size=10m")
    assert convert.main([source, str(out), *words]) == 0
    assert {name: inode_and_time(out / name) for name in kept} == kept
    assert len(open_model(str(out)).tensors) == 30


def test_an_error_of_torchs_writer_names_the_full_disk(mount: Path) -> None:
    remount(mount, "size=100k")
    with pytest.raises((OSError, RuntimeError)) as error:
        torch.save(torch.zeros(100_000), mount / "weights.pt")
    assert "No space left on device" in str(cannot_write(str(mount / "weights.pt"), error.value))


def test_a_read_only_destination_is_reported(
    write: Write, tmp_path: Path, mount: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, *words = small(write)
    remount(mount, "ro")
    assert convert.main([source, str(mount / "start"), *words]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: {mount}/start.partial: cannot be written (Read-only file system); "
        "give a destination where you may write\n"
    )


def test_a_file_in_place_of_the_parent_folder_is_reported(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, *words = small(write)
    (tmp_path / "file").touch()
    assert convert.main([source, str(tmp_path / "file" / "start"), *words]) == 2
    error = capsys.readouterr().err
    assert error == f"error: {tmp_path}/file/start.partial: cannot be created (File exists); give another destination\n"
