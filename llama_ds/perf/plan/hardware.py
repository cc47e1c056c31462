"""Descriptions of GPUs and the links between them, as YAML files in data/: one for each kind of machine.

Makers' figures (peak, memory bandwidth, links) are kept apart from what was measured or fitted (`Calibration`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llama_ds.config.reader import Place, read
from llama_ds.config.recompute import GIB
from llama_ds.config.text import dump_yaml, read_yaml
from llama_ds.errors import UserError, did_you_mean
from llama_ds.model.flops import device_peak

FOLDER = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Links:
    """How the GPUs of a machine, and machines, are connected."""

    gpus_per_node: int
    nvlink_gb_s: float  # bus bandwidth of a large all-reduce within a node, GB/s (nccl-tests' busbw)
    nvlink_latency_us: float  # of a collective of two ranks within a node
    nvlink_hop_us: float  # more for each hop of its ring
    network_gb_s: float  # a node's links to the others together, one direction, GB/s
    network_latency_us: float  # of a message, or a hop of a ring, between nodes


@dataclass(frozen=True)
class Calibration:
    """The physical constants of the time model; `tools/plan.py fit` writes them."""

    gemm_ceiling: float  # share of the peak that endless matrix products reach, with the largest tile
    gemm_ramp: float  # columns of K that a tile's start and end take as long as
    misaligned: float  # speed of a product whose rows are multiples of 16 bytes only, not of 128
    memory: float  # share of the memory bandwidth that pointwise kernels reach
    flash_forward: float  # share of the peak that fused attention reaches on long rows with heads of 128
    flash_backward: float
    network: float  # share of the network's bandwidth that collectives reach
    contention: float  # what a second of communication beside computation costs this: it takes multiprocessors
    launch_us: float  # the host's time for each kernel
    kernel_us: float  # the GPU's time to start and drain a kernel
    step_ms: float  # the host's time at the end of a step: reading the norm, the optimizer, data
    sources: str = ""  # where these numbers come from


@dataclass(frozen=True)
class Hardware:
    """One kind of machine."""

    name: str
    device: str  # as `model/flops.py` knows it: its peak
    memory_gib: float
    processors: int  # streaming multiprocessors
    bandwidth_gb_s: float  # memory bandwidth, GB/s
    power_w: float  # of one GPU, for the energy of a run
    links: Links
    calibration: Calibration

    @property
    def peak(self) -> float:
        """Dense bf16 peak, FLOP/s."""
        peak = device_peak(self.device, "bf16")
        assert peak is not None
        return peak

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB)

    def with_links(self, nvlink_gb_s: float | None, network_gb_s: float | None) -> Hardware:
        """Return the machine with other links, where given."""
        nvlink, network = nvlink_gb_s or self.links.nvlink_gb_s, network_gb_s or self.links.network_gb_s
        return replace(self, links=replace(self.links, nvlink_gb_s=nvlink, network_gb_s=network))


def names() -> list[str]:
    """Return the machines that are described."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load(name: str) -> Hardware:
    """Return the machine of that name, or in the YAML file of that path.

    Raises:
        UserError: no such machine, or a description that is not one.
    """
    known = names()
    path = FOLDER / f"{name.lower()}.yaml"
    if not path.is_file():
        if not name.endswith((".yaml", ".yml")):
            raise UserError(
                f"--gpu {name}: not a machine that is described{did_you_mean(name.lower(), known)}; use "
                f"{', '.join(known)}, or the path of a YAML file like llama_ds/perf/plan/data/a100-80gb.yaml"
            )
        path = Path(name)
    hardware = read(Hardware, read_yaml(str(path)), Place(str(path)))
    _check(hardware, str(path))
    return hardware


def text(hardware: Hardware) -> str:
    """Return the description as YAML."""
    return dump_yaml(asdict(hardware))


def _check(hardware: Hardware, path: str) -> None:
    place = Place(path)
    if device_peak(hardware.device, "bf16") is None:
        raise place.error("device", f"= {hardware.device!r} is no device whose peak model/flops.py knows, such as A100")
    for key, section in (("", hardware), ("links.", hardware.links), ("calibration.", hardware.calibration)):
        for name, value in vars(section).items():
            if isinstance(value, int | float) and not value > 0:
                raise place.error(key + name, f"= {value} is not positive")
    for name in ("gemm_ceiling", "misaligned", "memory", "flash_forward", "flash_backward", "network", "contention"):
        if getattr(hardware.calibration, name) > 1:
            raise place.error(
                f"calibration.{name}", f"= {getattr(hardware.calibration, name)} is above 1; it is a share"
            )
