"""The kernels that torch.compile makes of the model's functions, compiled for an A100 and an H100 without a device.

Usage: in_triton.py MODELS [CAPABILITY]

Inductor asks for a device's properties, Triton for its capability: both are given here. Tensors are fake, Triton's own
ptxas assembles the kernels, and nothing runs. Every function that the model compiles is named here (`cases`), with the
number of kernels that it becomes. Registers and spills are those of the configuration that spills least, and of these
needs the fewest registers: which one is fastest, a device has to say. None may need to spill.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ.update(DS_ACCELERATOR="cuda", TORCHINDUCTOR_COMPILE_THREADS="1")  # before torch is imported

import torch
import triton
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import _recursive_post_grad_passes
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

from llama_ds.model import fp8, fp8_delayed, loss, pointwise
from tests.fake_cuda import _guard_of_devices

DEVICES = {"8.0": ("NVIDIA A100-SXM4-80GB", 108), "9.0": ("NVIDIA H100 80GB HBM3", 132)}
PACKAGE = Path(pointwise.__file__).resolve().parents[1]
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
# 4 rows of 2,048 tokens of a 7B layer with grouped keys and values, and a chunk of its loss.
ROWS, T, HIDDEN, FEED_FORWARD, HEADS, GROUPS, HEAD, CHUNK, VOCABULARY = 4, 2048, 4096, 11008, 32, 8, 128, 1024, 32000


def main(capability: str) -> None:
    """Compile all kernels for a capability, and print what each needs."""
    name, processors = DEVICES[capability]
    pretend_device(name, capability, processors)
    found: dict[str, list[str]] = {}
    compiled = set[str]()

    def backend(codes: list[str]) -> Callable[..., Any]:
        return aot_autograd(fw_compiler=partial(lowered, codes), decompositions=select_decomp_table())

    @cache
    def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled.add(function.__name__)
        codes = found.setdefault(function.__name__, [])
        return torch.compile(function, dynamic=False, backend=backend(codes))

    pointwise._compiled = compile_function
    with _guard_of_devices(), FakeTensorMode(), torch.no_grad():
        for case in cases(capability):
            case()
    assert compiled == wanted(capability), compiled ^ wanted(capability)
    print(f"{name}, compute capability {capability}, torch {torch.__version__}, triton {triton.__version__}")
    for function, codes in sorted(found.items()):
        kernels = [kernel for code in codes for kernel in kernels_of(code)]
        assert len(kernels) == len(codes) * KERNELS.get(function, 1), (function, [name for name, _ in kernels])
        for kernel, autotuner in kernels:
            registers, spilled = min((needs(autotuner, config, capability) for config in autotuner.configs), key=_order)
            assert not spilled, (kernel, spilled)
            print(f"  {function:22} {kernel[:60]:60} {registers:3} registers", flush=True)


# Kernels of a function, if not one. RMSNorm: statistics of rows, sums over rows, gradient of x. Float8: a scale apart
# from what it scales, and the maximum of a tensor in two passes.
KERNELS = {"_rms_norm_backward": 3, "_quantised": 2, "_largest": 2, "_clamped": 2}


def cases(capability: str) -> list[Callable[[], Any]]:
    """Return calls of all functions that the model compiles; no tensor is given twice, which would fuse otherwise."""
    x, gradient, residual = (tensor(ROWS, T, HIDDEN) for _ in range(3))
    gate_up, grad, product = (tensor(ROWS * T, n * FEED_FORWARD) for n in (2, 1, 1))
    tables = (tensor(T, 1, HEAD, dtype=torch.float32), tensor(T, 1, HEAD, dtype=torch.float32))
    q, k, v = (tensor(ROWS, T, heads, HEAD) for heads in (HEADS, GROUPS, GROUPS))
    logits, lse, factor = tensor(CHUNK, VOCABULARY), *(tensor(CHUNK, dtype=torch.float32) for _ in range(2))
    found: list[Callable[[], Any]] = [
        lambda: pointwise.rms_norm(x, tensor(HIDDEN), 1e-5),
        lambda: pointwise.rms_norm_backward(gradient, x, tensor(HIDDEN), 1e-5, residual),
        lambda: pointwise.swiglu(gate_up),
        lambda: pointwise.swiglu_backward(grad, gate_up, None),
        lambda: pointwise.swiglu_backward(grad, gate_up, product),
        lambda: pointwise.rotate_heads(tensor(ROWS, T, HEADS + 2 * GROUPS, HEAD), HEADS + GROUPS, tables),
        lambda: pointwise.rotate_heads_back((q, k, v), tables),
        lambda: pointwise.compiled_for(logits, loss._rows_log_sum_exp)(logits),
        lambda: loss._softmax_(logits, lse, factor),
    ]
    if capability != "8.0":  # an A100 has no products in float8
        power = torch.empty((), dtype=torch.int32, device="cuda")
        found += [
            lambda: fp8.quantised(grad, fp8.row_maxima(grad), fp8.GRADIENT),
            lambda: fp8.quantised(grad, fp8.row_maxima(grad), fp8.FORWARD),
            lambda: pointwise.compiled_for(grad, fp8_delayed._largest)(grad),
            lambda: pointwise.compiled_for(grad, fp8_delayed._clamped)(grad, power, fp8.FORWARD),
        ]
    return found


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def wanted(capability: str) -> set[str]:
    """Return the names of all functions that the model compiles, read off its syntax trees."""
    found = set()
    for path in (PACKAGE / "model").glob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            name = call.func.id if isinstance(call.func, ast.Name) else ""
            function = call.args[-1] if name in ("compiled_for", "_compiled") else None
            if isinstance(function, ast.Name) and function.id != "function":
                found |= {function.id} if capability != "8.0" or not path.name.startswith("fp8") else set()
    return found


def lowered(codes: list[str], graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Add the code that Inductor makes of a graph to `codes`, and return the graph itself."""
    mode = detect_fake_mode(inputs)
    with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        _recursive_post_grad_passes(graph)
        lowering = GraphLowering(graph, example_inputs=inputs, shape_env=mode.shape_env)
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            codes.append(lowering.codegen()[0].value)
    return graph.forward


def kernels_of(code: str) -> list[tuple[str, Any]]:
    """Return (name, Inductor's autotuner) of each kernel."""
    found = []
    for name, source in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", code, re.DOTALL):
        with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:  # Triton reads the source again
            file.write(source)
        module = ModuleType(name)
        module.__file__ = file.name
        exec(compile(source, file.name, "exec"), vars(module))
        found.append((name, getattr(module, name)))
    return found


def needs(autotuner: Any, config: Any, capability: str) -> tuple[int, int]:
    """Return the registers of a thread and the bytes that it spills to memory."""
    meta = autotuner._create_compile_meta(config)
    source = triton.compiler.ASTSource(autotuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
    target, options = GPUTarget("cuda", meta["cc"], 32), autotuner._create_compile_options(config, meta)
    arch = f"sm_{capability.replace('.', '')}" + "a" * (capability == "9.0")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(triton.compile(source, target=target, options=options).asm["ptx"])
        command = [str(PTXAS), "-v", f"--gpu-name={arch}", str(path), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers and spilled, said
    return int(registers[1]), int(spilled[1])


def _order(found: tuple[int, int]) -> tuple[int, int]:
    return found[1], found[0]


def pretend_device(name: str, capability: str, processors: int) -> None:
    """Answer what Inductor and Triton ask of a device."""
    major, minor = map(int, capability.split("."))
    limits = {"regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024}
    memory = {"total_memory": 80 << 30, "shared_memory_per_block": 48 << 10}
    properties = SimpleNamespace(
        name=name, major=major, minor=minor, multi_processor_count=processors, warp_size=32, **limits, **memory
    )
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: name,
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_properties": lambda device=None: properties,
        "_get_device_properties": lambda device: properties,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
    }
    for attribute, value in answers.items():
        setattr(torch.cuda, attribute, value)

    class Driver(CudaDriver):
        def __init__(self) -> None:
            """Load no library of CUDA."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 10 * major + minor, 32)

    triton.runtime.driver.set_active(Driver())


if __name__ == "__main__":
    if len(sys.argv) > 2:
        main(sys.argv[2])
    else:
        for known in DEVICES:  # a process each: torch remembers what it has asked of a device
            subprocess.run([sys.executable, __file__, sys.argv[1], known], check=True)
