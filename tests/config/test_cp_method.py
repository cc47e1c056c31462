"""The choice of the method of context parallelism, and what is refused before any rank starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ds.config.context_parallel import cp_sizes, row_multiple
from llama_ds.config.run_file import load_run
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.layout.layout import resolve_layout
from llama_ds.layout.placement import findings, place_ranks

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
TWO_TP = ["parallel.tp=2", "parallel.sequence_parallel=true"]
RING, ALL_TO_ALL = "parallel.cp_method=ring", "parallel.cp_method=all_to_all"


def load(name: str, *overrides: str) -> RunConfig:
    return load_run(str(FOLDER / f"{name}.yaml"), list(overrides))


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        ([*TWO_TP, RING, "parallel.cp=3"],
         "data.seq_len = 256 is not a multiple of 6, as 2 * parallel.cp = 3 with cp_method ring and sequence_parallel "
         "with parallel.tp = 2 needs; use 252 or 258"),
        ([RING, "parallel.cp=4", "data.seq_len=252"], "data.seq_len = 252 is not a multiple of 8, as 2 * "
         "parallel.cp = 4 with cp_method ring needs; use 248 or 256"),
        ([ALL_TO_ALL, "parallel.cp=4", "data.seq_len=254"], "data.seq_len = 254 is not a multiple of 4, as "
         "parallel.cp = 4 with cp_method all_to_all needs; use 252 or 256"),
        ([*TWO_TP, ALL_TO_ALL, "parallel.cp=8"],
         "parallel.cp = 8 with cp_method all_to_all does not divide the 4 query heads of a rank "
         "(model.num_attention_heads / tp); use 1, 2 or 4, or cp_method ring"),
        ([*TWO_TP, "parallel.cp_method=hierarchical", "parallel.cp=3"],
         "parallel.cp_method = hierarchical: no number of ranks from 2 to below parallel.cp = 3 divides cp and the 4 "
         "query heads of a rank (model.num_attention_heads / tp); use cp_method ring"),
        ([*TWO_TP, "parallel.cp_method=hierarchical", "parallel.cp=8", "parallel.cp_all_to_all=8"],
         "parallel.cp_all_to_all = 8 does not divide parallel.cp = 8 and the 4 query heads of a rank "
         "(model.num_attention_heads / tp) into groups; use 2 or 4"),
        (["parallel.cp_method=hierarchical", "parallel.cp=4", "data.seq_len=254"], "data.seq_len = 254 is not "
         "a multiple of 4, as parallel.cp = 4 with cp_method hierarchical needs; use 252 or 256"),
        ([RING, "parallel.cp=2", "parallel.cp_all_to_all=2"], "parallel.cp_all_to_all = 2 is for cp_method "
         "hierarchical; leave it out with ring"),
        ([RING], "parallel.cp_method = ring shares rows over cp ranks and cp is 1; leave it out"),
        (["parallel.cp=0"], "parallel.cp = 0 is not positive"),
        (["parallel.cp=2", "parallel.cp_method=ulysses"], "parallel.cp_method = 'ulysses' is not auto, ring, "
         "all_to_all or hierarchical"),
    ],
)  # fmt: skip
def test_what_ranks_cannot_share_is_refused_with_values_that_would_do(overrides: list[str], rule: str) -> None:
    with pytest.raises(UserError) as error:
        load("quickstart", *overrides)
    assert str(error.value).endswith(f": {rule}")


@pytest.mark.parametrize(
    ("name", "overrides", "method", "reason"),
    [
        (
            "llama3_8b",
            ["data.seq_len=131072", "parallel.cp=8", "data.document_mask=false"],
            "ring",
            "it computes 32768 FLOPs for each byte",
        ),
        ("llama_65b", ["data.seq_len=32768", "parallel.cp=4"], "all_to_all", "a ring would compute 4096 FLOPs for"),
        ("llama_65b", ["data.seq_len=32768", "parallel.cp=16"], "ring", "parallel.cp = 16 does not divide the 8 query"),
        (
            "llama3_8b",
            [
                "data.seq_len=131072",
                "parallel.cp=8",
                "parallel.tp=1",
                "parallel.sequence_parallel=false",
                "data.document_mask=true",
            ],
            "all_to_all",
            "with data.document_mask, kernels",
        ),
        (
            "llama_65b",
            ["data.seq_len=65536", "parallel.tp=4", "parallel.cp=8"],
            "hierarchical (a ring of 4 groups of 2 ranks)",
            "a ring would compute 4096 FLOPs for each byte that it passes on, too few to hide its messages; 2 ranks of "
            "a node exchange heads, and the ring of these groups computes 8192 FLOPs",
        ),
        (
            "llama_65b",
            ["data.seq_len=65536", "parallel.tp=4", "parallel.cp=32"],
            "hierarchical (a ring of 16 groups of 2 ranks)",
            "parallel.cp = 32 does not divide the 16 query heads of a rank; 2 ranks of a node",
        ),
        ("quickstart", [RING, "parallel.cp=2"], "ring", "as parallel.cp_method says"),
    ],
)
def test_the_method_follows_from_heads_and_tokens(name: str, overrides: list[str], method: str, reason: str) -> None:
    sizes, why = cp_sizes(load(name, *overrides))
    assert sizes.words() == method and why.startswith(reason)


def test_cp_divides_the_ranks_but_not_the_global_batch() -> None:
    run = load("quickstart", *TWO_TP, "parallel.cp=2", RING)
    layout = resolve_layout(run, 16)
    assert (layout.dp, layout.cp, layout.data_axis, layout.accumulation, layout.global_batch) == (2, 2, 4, 2, 16)
    assert row_multiple(run) == 4
    with pytest.raises(
        UserError, match=r"parallel.pp 2 \* parallel.cp 2 \* parallel.tp 2 = 8; start 8, 16 or 24 ranks"
    ):
        resolve_layout(run, 12)


def test_placement_names_groups_that_pass_keys_between_hosts() -> None:
    axes = resolve_layout(load("quickstart", *TWO_TP, "parallel.cp=2", RING), 16)
    within, across = (
        [found.text for found in findings(place_ranks(dict.fromkeys("abcdefgh"[:n], 16 // n), axes))] for n in (2, 8)
    )
    assert "cp: all 8 groups of 2 ranks within a host" in within
    assert "dp * cp: all 4 groups of 4 ranks within a host, gradients reduced there" in within
    assert "cp: 8 of 8 groups of 2 ranks span hosts, the first a and b; all keys and values pass between them" in across
