"""Placement of ranks, the check of their groups, and the rank map as a table and as a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree

import pytest
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ds.errors import UserError
from llama_ds.layout.axes import Axes
from llama_ds.layout.nodelist import expand
from llama_ds.layout.placement import findings, place_ranks, sizes
from llama_ds.layout.rank_map import svg, table

SVG = "{http://www.w3.org/2000/svg}"


def nodes(count: int, slots: int = 8) -> dict[str, int]:
    return dict.fromkeys(expand(f"n[1-{count}]"), slots)


def found(hosts: Mapping[str, int], pp: int, tp: int) -> dict[str, tuple[str, str]]:
    """Return (severity, text) of the findings, by topic."""
    return {f.text.partition(":")[0]: (f.severity, f.text) for f in findings(place_ranks(hosts, Axes(pp=pp, tp=tp)))}


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
def test_ranks_are_numbered_as_in_deepspeed(pp: int, dp: int, tp: int) -> None:
    topology = PipeModelDataParallelTopology(num_pp=pp, num_mp=tp, num_dp=dp)
    ranks = place_ranks({"a": pp * dp * tp}, Axes(pp=pp, tp=tp))
    assert sizes(ranks) == Axes(pp=pp, dp=dp, tp=tp)
    for rank in ranks:
        assert (
            topology.get_rank(pipe=rank.coords.pp, data=rank.coords.dp, model=rank.coords.tp) == rank.rank == rank.slot
        )


@pytest.mark.parametrize(
    ("neighbours", "severity", "text"),
    [
        (2, "ok", "all 8 groups of 2 ranks within a host"),
        (4, "ok", "all 4 groups of 4 ranks within a host"),
        (
            8,
            "warning",
            "2 of 2 groups of 8 ranks span hosts, the first n1 and n2, between which gradients then pass in fp32; use "
            "parallel.gradient_neighbours = 1, 2 or 4",
        ),
    ],
)
def test_ranks_that_add_gradients_first_are_on_one_host(neighbours: int, severity: str, text: str) -> None:
    """Two hosts of eight ranks, tp 2: four data-parallel ranks of a host are neighbours."""
    *_, finding = findings(place_ranks(nodes(2), Axes(pp=1, tp=2)), neighbours)
    assert (finding.severity, finding.text) == (severity, f"gradient_neighbours: {text}")


def test_hosts_are_filled_in_the_files_order() -> None:
    ranks = place_ranks({"b": 1, "a": 3}, Axes(pp=2, tp=2))
    assert [(r.host, r.slot) for r in ranks] == [("b", 0), ("a", 0), ("a", 1), ("a", 2)]


@pytest.mark.parametrize(
    ("pp", "tp", "message"),
    [
        (3, 1, "hosts: 16 slots are not a multiple of pp 3 * tp 1 = 3; use 15 or 18 slots, or change pp or tp"),
        (4, 8, "hosts: 16 slots are not a multiple of pp 4 * tp 8 = 32; use 32 slots, or change pp or tp"),
        (0, 8, "pp 0 is not a parallel size; use 1 or more"),
        (1, -1, "tp -1 is not a parallel size; use 1 or more"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(pp: int, tp: int, message: str) -> None:
    with pytest.raises(UserError) as error:
        place_ranks(nodes(2), Axes(pp=pp, tp=tp))
    assert str(error.value) == message


def test_a_good_placement_is_summarized() -> None:
    assert found(nodes(256), 8, 8) == {
        "hosts": ("ok", "hosts: 256 hosts of 8 slots, 2048 ranks = pp 8 * dp 32 * tp 8"),
        "tp": ("ok", "tp: all 256 groups of 8 ranks within a host"),
        "pp": (
            "ok",
            "pp: of 1792 stage-to-stage links 0 within a host, 1792 between, "
            "those of a host to one next and from one previous host",
        ),
        "dp": (
            "ok",
            "dp: all 64 groups of 32 ranks over 32 hosts, 1 on a host; "
            "8 groups at most reduce gradients through a host's network",
        ),
    }


@pytest.mark.parametrize(
    ("hosts", "tp", "text"),
    [
        (nodes(2), 16, "1 of 1 groups of 16 ranks span hosts, first ranks 0-15 on n1 and n2; use a tp that divides "
                       "every host's slots: 1, 2, 4 or 8"),
        (nodes(3), 3, "2 of 8 groups of 3 ranks span hosts, first ranks 6-8 on n1 and n2; use a tp that divides every "
                      "host's slots: 1, 2, 4 or 8"),
        (nodes(4, 4), 16, "1 of 1 groups of 16 ranks span hosts, first ranks 0-15 on n1, n2 and 2 more; use a tp that "
                          "divides every host's slots: 1, 2 or 4"),
        ({"a": 6, "b": 10}, 4, "1 of 4 groups of 4 ranks span hosts, first ranks 4-7 on a and b; use a tp that divides "
                               "every host's slots: 1 or 2"),
    ],
)  # fmt: skip
def test_a_tensor_parallel_group_on_two_hosts_is_an_error(hosts: dict[str, int], tp: int, text: str) -> None:
    assert found(hosts, 1, tp)["tp"] == ("error", f"tp: {text}")


def test_a_tensor_parallel_group_may_fill_a_smaller_host() -> None:
    assert found({"a": 4, "b": 8}, 1, 4)["tp"][0] == "ok"


@pytest.mark.parametrize(
    ("hosts", "pp", "tp", "severity", "text"),
    [
        (nodes(1), 2, 2, "ok", "of 4 stage-to-stage links 4 within a host, 0 between"),
        (nodes(2), 4, 1, "ok", "of 12 stage-to-stage links 8 within a host, 4 between, those of a host to one next"),
        (nodes(3), 2, 1, "warning", "of 12 stage-to-stage links 0 within a host, 12 between, those of 2 hosts "
                                    "scattered, first n1's to n2 and n3; a stage's 12 ranks do not fill hosts of "
                                    "8; use a pp that divides 3 hosts"),
        ({"a": 4, "b": 4, "c": 8}, 2, 4, "warning", "of 8 stage-to-stage links 0 within a host, 8 between, those of 1 "
                                                    "host scattered, first c's from a and b; the hosts' slots differ"),
        ({"a": 8, "b": 4, "c": 4}, 2, 4, "warning", "of 8 stage-to-stage links 0 within a host, 8 between, those of 1 "
                                                    "host scattered, first a's to b and c; the hosts' slots differ"),
        ({"a": 4, "b": 8, "c": 4}, 2, 4, "ok", "of 8 stage-to-stage links 0 within a host, 8 between, those of a host"),
    ],
)  # fmt: skip
def test_scattered_pipeline_neighbours_cause_a_warning(
    hosts: dict[str, int], pp: int, tp: int, severity: str, text: str
) -> None:
    actual = found(hosts, pp, tp)["pp"]
    assert actual[0] == severity and actual[1].startswith(f"pp: {text}")


@pytest.mark.parametrize(
    ("hosts", "pp", "tp", "text"),
    [
        (nodes(2), 2, 1, "all 2 groups of 8 ranks within a host, gradients reduced there"),
        (nodes(2), 1, 1, "the group of 16 ranks over 2 hosts, 8 on a host; 1 group at most reduces gradients through a "
                         "host's network"),
        (nodes(3), 2, 1, "all 2 groups of 12 ranks over 2 hosts, 4 to 8 on a host; 2 groups at most reduce gradients "
                         "through a host's network"),
        (nodes(2), 2, 8, "1, no gradients to reduce between ranks"),
    ],
)  # fmt: skip
def test_the_hosts_of_a_gradient_reduction_are_counted(hosts: dict[str, int], pp: int, tp: int, text: str) -> None:
    assert found(hosts, pp, tp)["dp"] == ("ok", f"dp: {text}")


def test_uneven_slots_cause_a_warning() -> None:
    assert found({"a": 8, "b": 4, "c": 8}, 1, 4)["hosts"] == (
        "warning",
        "hosts: slots differ: 2 hosts of 8 slots (a and c), 1 host of 4 slots (b); 20 ranks = pp 1 * dp 5 * tp 4; "
        "use as many of every host, or leave hosts out",
    )


def test_the_table_has_a_line_for_each_pattern() -> None:
    assert table(place_ranks(nodes(256), Axes(pp=4, tp=8))).splitlines() == [
        "hosts       count  slots  ranks      stage  dp               tp",
        "n[1-64]     64     0-7    0-511      0      0-63 (1 a host)  0-7",
        "n[65-128]   64     0-7    512-1023   1      0-63 (1 a host)  0-7",
        "n[129-192]  64     0-7    1024-1535  2      0-63 (1 a host)  0-7",
        "n[193-256]  64     0-7    1536-2047  3      0-63 (1 a host)  0-7",
    ]


def test_the_table_splits_hosts_with_differing_stages() -> None:
    assert table(place_ranks(nodes(3), Axes(pp=2, tp=1))).splitlines() == [
        "hosts  count  slots  ranks  stage  dp    tp",
        "n1     1      0-7    0-7    0      0-7   0",
        "n2     1      0-3    8-11   0      8-11  0",
        "n2     1      4-7    12-15  1      0-3   0",
        "n3     1      0-7    16-23  1      4-11  0",
    ]
    assert len(table(place_ranks(nodes(8), Axes(pp=2, tp=1)), every_host=True).splitlines()) == 1 + 8


LAYOUTS = st.tuples(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 4))


@settings(deadline=None)
@given(LAYOUTS, st.booleans())
def test_the_table_has_every_rank_once(layout: tuple[list[int], int, int], every_host: bool) -> None:
    slots, pp, tp = layout
    slots[-1] += -sum(slots) % (pp * tp)
    ranks = place_ranks({f"n{i}": count for i, count in enumerate(slots)}, Axes(pp=pp, tp=tp))
    lines = [re.split(r"  +", line) for line in table(ranks, every_host).splitlines()[1:]]
    listed = [rank for line in lines for rank in span(line[3])]
    assert sorted(listed) == list(range(len(ranks)))
    for names, count, _, some, stages, dp, tp_ranks in lines:
        assert len(expand(names)) == int(count)
        here = [ranks[rank] for rank in span(some)]
        assert {r.host for r in here} == set(expand(names))
        assert {r.coords.pp for r in here} == set(span(stages)) and {r.coords.tp for r in here} == set(span(tp_ranks))
        assert {r.coords.dp for r in here} == set(span(dp.partition(" ")[0]))


def span(text: str) -> list[int]:
    ends = [[int(end) for end in item.split("-")] for item in text.split(",")]
    return [n for first, *last in ends for n in range(first, (last[0] if last else first) + 1)]


@pytest.mark.parametrize(("hosts", "pp", "tp"), [(nodes(2), 2, 4), (nodes(256), 8, 8), ({"x.y": 3, "b": 9}, 2, 3)])
def test_the_picture_shows_every_rank_in_its_stages_colour(hosts: dict[str, int], pp: int, tp: int) -> None:
    ranks = place_ranks(hosts, Axes(pp=pp, tp=tp))
    root = ElementTree.fromstring(svg(ranks, "Ranks"))
    slots = [g for g in root.iter(f"{SVG}g") if g.find(f"{SVG}title") is not None]
    assert [g.findtext(f"{SVG}title") for g in slots] == [
        f"rank {r.rank}: {r.host} slot {r.slot}, stage {r.coords.pp}, dp {r.coords.dp}, tp {r.coords.tp}" for r in ranks
    ]
    colours = [g.find(f"{SVG}rect").attrib["fill"] for g in slots]
    assert len(set(colours)) == pp and len(set(zip(colours, (r.coords.pp for r in ranks), strict=True))) == pp
    assert [[t.text for t in g.iter(f"{SVG}text")] for g in slots] == [
        [str(r.rank), f"{r.coords.pp}.{r.coords.dp}.{r.coords.tp}"] for r in ranks
    ]


def test_the_picture_contains_all_boxes_without_overlap() -> None:
    root = ElementTree.fromstring(svg(place_ranks(nodes(32), Axes(pp=4, tp=8)), "Ranks"))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    boxes = set()
    for group in root.iter(f"{SVG}g"):
        if "transform" in group.attrib:
            x, y = map(int, re.findall(r"\d+", group.attrib["transform"]))
            box = next(r for r in group.iter(f"{SVG}rect") if r.attrib["class"] == "h").attrib
            boxes.add((x, y, int(box["width"]), int(box["height"])))
    assert len(boxes) == 32
    for x, y, w, h in boxes:
        assert x + w <= width and y + h <= height
        assert not any(abs(a - x) < w and abs(b - y) < h and (a, b) != (x, y) for a, b, _, _ in boxes)


def test_tensor_parallel_groups_are_outlined_and_red_if_on_two_hosts() -> None:
    drawn = svg(place_ranks({"a": 3, "b": 5}, Axes(pp=1, tp=2)), "Ranks")
    assert len(re.findall(r'<rect class="g" x="\d+" y="1"', drawn)) == 3
    assert len(re.findall(r'<rect class="x" x="\d+" y="1"', drawn)) == 2  # ranks 2 and 3, each on its host
    assert '<rect class="g" x="1" y="1"' not in svg(place_ranks({"a": 4}, Axes(pp=2, tp=1)), "Ranks")


@settings(deadline=None)
@given(st.text())
def test_any_title_gives_valid_xml(title: str) -> None:
    root = ElementTree.fromstring(svg(place_ranks({"a": 1}, Axes(pp=1, tp=1)), f"<&\"'\x00\ud800>{title}").encode())
    assert (root.findtext(f"{SVG}title") or "").startswith("<&\"'??>")
