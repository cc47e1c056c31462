"""Layouts with context parallelism, drawn by hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from llama_ds.config.rules import check
from llama_ds.errors import UserError
from llama_ds.layout.layout import resolve_layout
from tests.parallel.layout_cases import GLOBAL_BATCH, Case

# (tied, document_mask, z_loss): each needs a run in plain torch
MATHEMATICS = [(False, False, 0.0), (False, True, 0.0), (True, True, 0.0), (True, False, 1e-3)]
SCHEDULES: list[dict[str, Any]] = [
    {"schedule": "1f1b"},
    {"schedule": "zb_h1"},
    {"schedule": "interleaved", "virtual_stages": 2},
    {"schedule": "dualpipe_v", "virtual_stages": 2},
    {"schedule": "zb_v", "virtual_stages": 2, "extra_warmup": 1},
]


@st.composite
def shared_rows(draw: st.DrawFn, world: int) -> Case:
    """Draw a layout of `world` ranks with cp above 1; run files may be refused with it."""
    cp = draw(st.sampled_from([n for n in range(2, world + 1) if world % n == 0]))
    axes = {"pp": 1, "tp": 1, "dp": 1}
    left = world // cp
    while left > 1:
        axes[draw(st.sampled_from(sorted(axes)))] *= 2
        left //= 2
    tied, document_mask, z_loss = draw(st.sampled_from(MATHEMATICS))
    return Case(
        **axes,
        cp=cp,
        cp_method=draw(st.sampled_from(["ring", "all_to_all", *(["hierarchical"] if cp > 2 else [])])),
        zero=1 if axes["pp"] > 1 else draw(st.integers(0, 3)),
        sequence_parallel=axes["tp"] > 1 and draw(st.booleans()),
        tied=tied,
        document_mask=document_mask,
        z_loss=z_loss,
        recompute=draw(st.sampled_from(["none", "selective", "full"])),
        decoder_layer=draw(st.sampled_from(["manual_backward", "autograd"])),
        micro_batch=draw(st.sampled_from([n for n in (1, 2, 4, 8) if GLOBAL_BATCH // axes["dp"] % n == 0])),
        **(draw(st.sampled_from(SCHEDULES)) if axes["pp"] > 1 else {}),
        steps=3,
    )


def drawn_layouts(world: int, count: int, number: int = 0) -> list[Case]:
    """Return `count` different layouts that run files accept, the same for each `number`.

    They are drawn before any rank starts, so that all share one start. Early examples of hypothesis are simple, and
    neighbours alike.
    """
    found: dict[Case, None] = {}

    @seed(number)
    @settings(
        max_examples=60 + 5 * count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(shared_rows(world))
    def draw(case: Case) -> None:
        try:
            check(case.run)
            resolve_layout(case.run, world)
        except UserError:
            return
        found[case] = None

    draw()
    cases = list(found)
    return cases[len(cases) - 1 :: -(len(cases) // count)][:count]
