"""Results to Markdown, JSON, history and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.fsbench import history
from benchmarks.fsbench.counts import keep_fewer, too_many
from benchmarks.fsbench.report import as_markdown
from benchmarks.fsbench.results import layer_ratios, read_json, write_json

from .results import OTHER, OURS, measure, results


def rows(markdown: str, first: str) -> list[list[str]]:
    """Cells of the table rows that begin with `first`."""
    lines = [line for line in markdown.splitlines() if line.startswith(f"| {first} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_table_of_ratios_and_requests() -> None:
    one = measure("cold_present", 1e-3, 19e-3)
    one.requests[OURS] = {"LOOKUP": 102, "GETATTR": 0}
    said = as_markdown(results(one))
    times, requests = rows(said, "the work cold_present")
    assert times[1:] == ["20.0 µs", "-", "**19.00** [19.00 to 19.00], 380 µs", "1.02"]
    assert requests[1:] == ["100", "**1.02**: LOOKUP 1.02"]


def test_every_figure_of_design_is_there_measured_or_not() -> None:
    said = as_markdown(results(measure("cold_present", 1, 19), measure("warm_present", 1, 0.5)))
    assert rows(said, "cold stat, 10 layers") == [
        ["cold stat, 10 layers", "1", "19.00: missed by a factor of 19.00"]
    ]
    assert rows(said, "warm stat") == [["warm stat", "0.75", "0.50: met"]]
    assert rows(said, "untar") == [["untar", "2.5", "not measured"]]
    assert "| commit of 1 GiB, against tar \\| pigz | 1 | 0.22: met |" in said
    assert "Numbers to reach" not in as_markdown(results(), judged=False)


def test_what_was_left_out_or_wrong_is_told() -> None:
    one = measure("untar", 1, 19)
    one.wrong[OURS] = "top/00: wrong link"
    found = results(one)
    found.failures.append("layerfs, mixed, stat: no end after 60 s")
    said = as_markdown(found)
    assert "* Left out: mergerfs: not installed" in said
    assert "* Skipped: data: fio is not installed" in said
    assert "* layerfs, the work untar: WRONG: top/00: wrong link" in said
    assert "* FAILED: layerfs, mixed, stat: no end after 60 s" in said
    assert rows(said, "the work untar")[0][3] == "wrong"
    assert len(found.wrong()) == 2


def test_the_wrongs_of_others_are_not_ours() -> None:
    one = measure("untar", 1, 19)
    one.wrong[OTHER] = "top/00: wrong link"
    assert results(one).wrong() == []


def test_json_and_back(tmp_path: Path) -> None:
    one = measure("cold_present", 1, 19)
    one.requests[OURS] = {"LOOKUP": 102}
    before = results(one)
    write_json(before, tmp_path / "new" / "a.json")
    assert read_json(tmp_path / "new" / "a.json") == before
    told = json.loads((tmp_path / "new" / "a.json").read_text())
    assert told["measures"][0]["ratio"][OURS] == pytest.approx(19)
    assert told["limits"][OURS][0] == {
        "work": "cold stat, 10 layers",
        "most": 1.0,
        "found": pytest.approx(19),
        "met": False,
    }


def test_history_gets_a_row_each_run(tmp_path: Path) -> None:
    path = tmp_path / "HISTORY.md"
    for seconds in (19, 0.5):
        history.append(results(measure("cold_present", 1, seconds)), path)
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    head, rule, first, second = lines[-4:]
    assert {line.count("|") for line in (head, rule, first, second)} == {head.count("|")}
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells[:4] == ["2026-01-02", "a processor, 2 cores, 6.1.0", "layerfs 0.1.0", "fuse-overlayfs 1.10"]
    assert cells[4:6] == ["19.00", "-"]
    assert first.endswith("| 1 of 2 |")  # commit with gzip was measured, too
    assert second.endswith("| 2 of 2 |")


def test_the_committed_history_has_todays_columns() -> None:
    committed = Path(__file__).parents[2] / "benchmarks" / "HISTORY.md"
    assert committed.read_text().startswith(history.head())


def test_ratios_of_layers(tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    assert layer_ratios(path) == {}
    two, one = [{"seconds": 2.0}, {"seconds": 4.0}], [{"seconds": 1.0}, {"seconds": 1.0}]
    runs = {"tar | pigz": two, "layerfs commit": one}
    commit = {"job": "commit", "compression": "gzip", "base": "tar | pigz", "runs": runs}
    absent = {"job": "commit", "compression": "zstd", "base": "tar | zstd", "runs": {"tar | zstd": []}}
    apply = {**commit, "job": "apply", "compression": "none"}
    path.write_text(json.dumps({"measures": [commit, absent, apply]}))
    assert layer_ratios(path) == {"gzip": pytest.approx(0.375)}


def test_counts_are_told_when_they_are_too_many() -> None:
    one = measure("warm_present", 1, 1)
    assert too_many(results(one)) == {}  # nobody counted
    one.requests[OURS] = {}
    one.requests[OTHER] = {"LOOKUP": 500}
    assert too_many(results(one)) == {}
    one.requests[OURS] = {"GETATTR": 7}
    said = "layerfs, the work warm_present: 0.07 requests, at most 0: GETATTR 7"
    assert too_many(results(one)) == {"warm_present": said}


def test_the_smaller_of_two_counts_is_kept() -> None:
    before, again = results(measure("a", 1, 1), measure("b", 1, 1)), results(measure("a", 1, 1))
    before.measures["a"].requests[OURS] = {"GETATTR": 7, "LOOKUP": 1}
    before.measures["b"].requests[OURS] = {"GETATTR": 7}
    again.measures["a"].requests[OURS] = {"LOOKUP": 2}
    keep_fewer(before, again)
    assert before.measures["a"].requests[OURS] == {"LOOKUP": 2}
    assert before.measures["b"].requests[OURS] == {"GETATTR": 7}
    again.measures["a"].requests[OURS] = {"LOOKUP": 3}
    keep_fewer(before, again)
    assert before.measures["a"].requests[OURS] == {"LOOKUP": 2}
