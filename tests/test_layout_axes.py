"""Ranks and coordinates: the numbering is DeepSpeed's, and only the layout room converts between them."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path

import pytest
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ds.errors import UserError
from llama_ds.layout.axes import AXES, Axes, Coords
from llama_ds.layout.layout import Layout
from llama_ds.layout.ranks import choose_ranks

REPO = Path(__file__).resolve().parent.parent
SIZES = st.builds(Axes, **{axis: st.integers(1, 4) for axis in AXES})


def test_sizes_and_coordinates_name_the_same_axes() -> None:
    assert tuple(field.name for field in fields(Axes)) == AXES


@settings(deadline=None, max_examples=50)
@given(SIZES)
def test_coordinates_and_ranks_are_inverse_and_in_deepspeeds_order(axes: Axes) -> None:
    topology = PipeModelDataParallelTopology(num_pp=axes.pp, num_mp=axes.tp, num_dp=axes.dp * axes.cp)
    for rank in range(axes.world):
        at = axes.coords(rank)
        assert axes.rank(**at._asdict()) == rank
        assert topology.get_rank(pipe=at.pp, data=at.dp * axes.cp + at.cp, model=at.tp) == rank
    assert axes.groups("tp") == topology.get_axis_comm_lists("model") or axes.tp == 1
    assert axes.groups("pp") == topology.get_axis_comm_lists("pipe") or axes.pp == 1
    assert axes.groups("dp", "cp") == topology.get_axis_comm_lists("data") or axes.dp * axes.cp == 1


@settings(deadline=None, max_examples=50)
@given(SIZES, st.sets(st.sampled_from(AXES)))
def test_groups_partition_the_ranks_and_vary_only_along_their_axes(axes: Axes, along: set[str]) -> None:
    groups = axes.groups(*along)
    assert sorted(rank for group in groups for rank in group) == list(range(axes.world))
    for group in groups:
        assert set(axes.varying(group)) == {axis for axis in along if getattr(axes, axis) > 1}
        assert all(axes.group(rank, *along) == group for rank in group)


def test_neighbours_along_an_axis_are_a_stride_apart() -> None:
    axes = Axes(pp=2, dp=3, cp=2, tp=4)
    assert [axes.stride(axis) for axis in AXES] == [24, 8, 4, 1]
    for axis in AXES:
        assert axes.rank(**{axis: 1}) == axes.stride(axis)


@pytest.mark.parametrize("coords", [{"tp": 4}, {"pp": -1}, {"dp": 1}])
def test_a_coordinate_beyond_its_axis_is_refused(coords: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="is not one of 0 to"):
        Axes(pp=2, tp=4).rank(**coords)


def test_a_rank_beyond_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 8 is not one of 0 to 7"):
        Axes(pp=2, tp=4).coords(8)


def test_messages_name_the_three_axes_and_others_only_if_used() -> None:
    assert Axes(pp=2, tp=4).words() == "pp 2 x dp 1 x tp 4"
    assert Axes(pp=2, cp=2).words(" * ") == "pp 2 * dp 1 * cp 2 * tp 1"
    assert (Coords(pp=1).words(), Coords(cp=1).words()) == ("pp 1 dp 0 tp 0", "pp 0 dp 0 cp 1 tp 0")


def test_checkpoints_record_the_layout_without_unused_axes() -> None:
    assert Layout(pp=2, dp=4, tp=2, micro_batch=1, accumulation=8).as_data() == {
        "world": 16, "pp": 2, "dp": 4, "tp": 2, "micro_batch": 1, "accumulation": 8, "global_batch": 32,
    }  # fmt: skip


def test_words_for_ranks_mean_the_same_in_every_tool() -> None:
    axes = Axes(pp=4, dp=2, tp=8)
    assert choose_ranks("last, first,3,middle", axes, "--rank") == [0, 3, 32, 48]
    assert choose_ranks("none", axes, "--ranks") == []
    assert choose_ranks("all", axes, "--ranks") == list(range(64))
    for wrong, words in (("64", "the layout has 64 ranks, pp 4 x dp 2 x tp 8; use 0 to 63"), ("lst", "did you mean")):
        with pytest.raises(UserError, match=words):
            choose_ranks(wrong, axes, "--ranks")


def _is_size(node: ast.expr) -> bool:
    """Return whether an expression is an axis size or a product of them: `layout.dp`, `self._tp`, `dp * tp`."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return _is_size(node.left) and _is_size(node.right)
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name.strip("_").removesuffix("_size").removeprefix("num_") in AXES


def _has_rank(node: ast.expr) -> bool:
    """Return whether an expression contains a name that ends in rank."""
    named = [n for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute)]
    names = {n.id if isinstance(n, ast.Name) else n.attr for n in named}
    return any(name == "rank" or name.endswith("_rank") for name in names)


def rank_arithmetic(source: str) -> list[int]:
    """Return the lines that convert a rank to coordinates or coordinates to a rank."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "divmod":
            left, right = node.args
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv | ast.Mod | ast.Mult):
            left, right = node.left, node.right
        else:
            continue
        if (_has_rank(left) and _is_size(right)) or (_is_size(left) and _has_rank(right)):
            found.append(node.lineno)
    return found


def test_only_the_layout_room_converts_ranks_to_coordinates() -> None:
    files = [p for top in ("llama_ds", "tools") for p in (REPO / top).rglob("*.py")]
    others = [p for p in files if "layout" not in p.relative_to(REPO).parts[:2]]
    assert len(others) > 200
    broken = [f"{p.relative_to(REPO)}:{line}" for p in others for line in rank_arithmetic(p.read_text())]
    assert not broken, "use llama_ds.layout.axes instead: " + ", ".join(broken)


@pytest.mark.parametrize(
    "code",
    [
        "rank = (pp_rank * dp + dp_rank) * tp + tp_rank",
        "rest, tp_rank = divmod(rank, self.tp)",
        "n = place.rank // layout.tp % layout.dp",
        "first = stage_rank * (layout.dp * layout.tp)",
        "dp_rank = global_rank % dp_size",
    ],
)
def test_rank_arithmetic_is_caught(code: str) -> None:
    assert rank_arithmetic(code)


@pytest.mark.parametrize("code", ["share = rows // layout.dp", "a, b = divmod(row, self.global_batch)", "x = rank + 1"])
def test_other_arithmetic_is_not(code: str) -> None:
    assert not rank_arithmetic(code)
