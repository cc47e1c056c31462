"""Imports that DeepSpeed's engines and torch's optimizers would make and nobody needs: over half of a rank's start."""

from __future__ import annotations

import importlib

import torch
from deepspeed.runtime import compiler


def leave_out_compiler() -> None:
    """Keep optimizers from importing torch._dynamo, and DeepSpeed's engines from importing Inductor.

    torch's optimizers import it so that compiled regions exclude some of their methods, but here no step is compiled.
    Where torch has other private names, they import it as before. DeepSpeed's engines import its Muon, which compiles a
    function at once, but no run uses that Muon. Compiled pointwise operations import the compiler themselves.
    """
    for method in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        function = getattr(getattr(torch.optim.Optimizer, method), "__wrapped__", None)
        if function is not None:
            setattr(function, "__dynamo_disable", function)
    if step := getattr(torch.optim.Adam.step, "__wrapped__", None):
        torch.optim.Adam.step = torch.no_grad()(step)  # type: ignore[method-assign]
    compile_of_deepspeed = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_of_deepspeed
