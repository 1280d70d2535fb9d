"""One report of many runs: means over seeds, paired differences, what failed and what differs."""

import copy
import csv
import io
import json
import math
import shutil
from pathlib import Path

import pytest
import yaml
from browser import chromium
from made import metric, write_run
from scipy.stats import t
from test_page import Numbers, compiles

from compress.errors import UserError
from compress.report.best import best
from compress.report.many import write_many
from compress.report.page import Content
from compress.report.runs import differences, find_runs, read_runs, students
from compress.report.seeds import all_series, difference, student, without_seed
from compress.report.table import columns_of

FIDS = {0.25: (150.0, 153.0, 156.0), 0.5: (160.0, 162.0, 167.0)}  # by ratio and seed
TEACHER = (117.0, 119.0, 124.0)


@pytest.fixture
def grid(result, grids, tmp_path) -> Path:
    """Two ratios with three seeds each, and a point that failed."""
    few = {name: grids[name] for name in ("teacher", "quantize")}
    for ratio, fids in FIDS.items():
        for seed, fid in enumerate(fids):
            folder = tmp_path / "grid" / f"ratio={ratio},seed={seed}"
            one = copy.deepcopy(result) | {"seed": seed}
            one["teacher"]["fingerprint"] = "f"
            one["teacher"]["metrics"]["fid"] = metric(TEACHER[seed], 5.0, "inception-2015-12-05", n_reference=1000)
            one["stages"][-1]["metrics"]["fid"] = metric(fid, 5.0, "inception-2015-12-05", n_reference=1000)
            one["stages"][-1]["cost"]["bytes"] = 1_000_000 * int(10 - 10 * ratio)
            one["stages"][0] |= {"key": "shared", "cached": ratio == 0.5}
            for stage in one["stages"][1:]:
                stage["key"] = f"{stage['name']}{ratio}{seed}"
            write_run(folder, one, few)
            config = {"stages": {"prune": {"ratio": ratio, "heads": "auto"}}, "seed": seed, "out": str(folder)}
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
    failed = tmp_path / "grid" / "ratio=1.5,seed=0"
    failed.mkdir()
    about = {"overrides": ["stages.prune.ratio=1.5", "seed=0"], "message": "ratio=1.5: expected < 1", "exit_code": 2}
    (failed / "failure.json").write_text(json.dumps(about))
    return tmp_path / "grid"


def test_the_mean_over_seeds_has_an_interval_by_students_t():
    value, half = student([150.0, 153.0, 156.0])
    assert value == 153.0 and half == pytest.approx(t.ppf(0.975, 2) * 3.0 / math.sqrt(3))


def test_runs_that_differ_in_the_seed_alone_are_one_point(grid):
    runs, failed = read_runs(find_runs(str(grid)))
    series = all_series(students(runs))
    assert [one.line.name for one in series] == ["ratio=0.25", "ratio=0.5"]
    assert [list(one.students) for one in series] == [[0, 1, 2]] * 2
    fid = series[0].line.entry["metrics"]["fid"]
    half = t.ppf(0.975, 2) * 3.0 / math.sqrt(3)
    assert (fid["value"], fid["low"], fid["high"]) == pytest.approx((153.0, 153.0 - half, 153.0 + half))
    assert fid["network"] == "inception-2015-12-05" and series[0].line.teacher["metrics"]["fid"]["value"] == 120.0
    assert [run.message for run in failed] == ["ratio=1.5: expected < 1"]


def test_the_interval_of_a_mean_stays_in_what_the_number_can_be(grid):
    """A machine that was busy once gives no time below 0; equal shares say no more than what each says."""
    for seed, latency in enumerate((0.010, 0.011, 0.100)):
        file = grid / f"ratio=0.25,seed={seed}" / "report.json"
        report = json.loads(file.read_text())
        last = report["stages"][-1]
        last["cost"]["latency_s"] = latency
        last["metrics"]["r_at_1"] = metric(0.98, 0.03) | {"high": 1.0}
        last["metrics"]["precision"] = metric((0.90, 0.99, 0.80)[seed], 0.01) | {"why": "too few"}
        last["metrics"]["psnr"]["equal"] = seed
        file.write_text(json.dumps(report | {"stages": [*report["stages"][:-1], last | {"model_file": "model.py"}]}))
    mean = all_series(students(read_runs(find_runs(str(grid)))[0]))[0].line.entry
    cost, metrics = mean["cost"], mean["metrics"]
    assert 0 < cost["latency_low_s"] < cost["latency_s"] == pytest.approx((0.010 * 0.011 * 0.100) ** (1 / 3))
    assert metrics["precision"]["high"] == 1.0 and metrics["precision"]["low"] < 0.7
    assert metrics["r_at_1"]["high"] == pytest.approx(0.98 + 0.025 / math.sqrt(3))
    assert metrics["psnr"]["equal"] == 3 and mean["model_file"] == "model.py" and "why" not in metrics["precision"]


def test_points_of_the_same_training_share_a_curve(grid, tmp_path):
    for ratio in FIDS:
        file = grid / f"ratio={ratio},seed=0" / "report.json"
        report = json.loads(file.read_text())
        report["stages"][0]["curves"] = {"loss": [[10, 0.5], [20, 0.25]]}
        file.write_text(json.dumps(report))
    content = write_many(tmp_path / "report", "A grid", *read_runs(find_runs(str(grid))))[1]
    assert ["ratio=0.25 and 1 more of the same training"] in [list(curves) for curves in content.curves.values()]
    assert content.notes[-1] == "Pictures and curves are those of seed 0."


def test_differences_are_paired_by_seed(grid):
    series = all_series(students(read_runs(find_runs(str(grid)))[0]))
    entries = [{seed: s.line.entry for seed, s in one.students.items()} for one in series]
    column = next(column for column in columns_of(list(entries[0].values())) if column.key == "fid")
    found = difference(column, entries[1], entries[0])
    assert found == pytest.approx(student([10.0, 9.0, 11.0]))  # 10 with a half width of 2.5; unpaired it is 10 +- 11
    assert found[0] > found[1]
    alone = difference(column, {0: entries[1][0]}, {0: entries[0][0]})
    assert alone == pytest.approx((10.0, math.hypot(5.0, 5.0)))  # two draws of one seed
    assert difference(column, {0: entries[1][0]}, {1: entries[0][1]}) is None


def test_the_files_hold_the_same_numbers(grid, tmp_path):
    runs, failed = read_runs(find_runs(str(grid)))
    out = tmp_path / "report"
    write_many(out, "Ratios", runs, failed)
    page = Numbers((out / "report.html").read_text())
    headings, body = page.tables[1]
    place = [text for text, *_ in headings].index("FID ↓")
    means = {row[0][0]: row[place] for row in body}
    assert {name: float(cell[1]) for name, cell in means.items() if "ratio" in name} == {
        "ratio=0.25": 153.0, "ratio=0.5": 163.0,
    }  # fmt: skip
    assert means["teacher"][0].split()[0] == "120.0" and means["ratio=0.25"][2] == "best", "apart beyond the noise"
    rows = list(csv.DictReader(io.StringIO((out / "report.csv").read_text())))
    assert {row["point"]: row["fid"] for row in rows if row["folder"]} == {
        f"ratio={ratio}, seed={seed}": str(fid) for ratio, fids in FIDS.items() for seed, fid in enumerate(fids)
    }
    assert {row["point"]: row["fid"] for row in rows if row["point"].startswith("teacher")} == {
        "teacher, seed=0": "117.0", "teacher, seed=1": "119.0", "teacher, seed=2": "124.0",
    }  # fmt: skip
    found = json.loads((out / "points.json").read_text())
    assert [(p["name"], p["seeds"], p["metrics"]["fid"]["value"]) for p in found["points"]] == [
        ("ratio=0.25", [0, 1, 2], 153.0), ("ratio=0.5", [0, 1, 2], 163.0),
    ]  # fmt: skip
    apart = found["points"][0]["from_teacher"]["fid"]
    assert apart["value"] == pytest.approx(33.0) and apart["low"] == pytest.approx(33 - student([32.0, 33.0, 34.0])[1])
    assert found["runs"][3]["config"] == {"stages.prune.ratio": 0.5, "seed": 0}
    assert set(found["fronts"]["FID and size"]) == {"teacher", "ratio=0.25", "ratio=0.5"}
    text = (out / "report.md").read_text()
    assert "6 runs, 3 seeds, 2 points, 1 failed." in text
    assert "| ratio=1.5, seed=0 | ratio=1.5: expected < 1 | 2 | stages.prune.ratio=1.5 seed=0 |" in text
    assert "## Difference from ratio=0.25" in text and "+10.0 [+7.5, +12.5]" in text
    assert "18, 13 of them distinct" in text, "the shared stage counts once"
    assert "heads" not in text, "the same in all configs"


def test_means_of_fewer_seeds_and_of_several_protocols_say_so(grid, tmp_path):
    shutil.rmtree(grid / "ratio=0.5,seed=2")
    file = grid / "ratio=0.25,seed=0" / "report.json"
    report = json.loads(file.read_text())
    for manifest, mixed in (
        ({"protocol": "quick", "version": 1, "changed": ["guidance"]}, False),
        ({"protocol": "fidelity", "version": 1, "changed": []}, True),
    ):
        file.write_text(json.dumps({**report, "manifest": manifest}))
        _, content = write_many(tmp_path / "report", "A grid", *read_runs(find_runs(str(grid))))
        assert content.notes[0].startswith("The runs were not all measured by one protocol") == mixed
        assert content.notes[0].startswith("Protocol quick version 1 with other guidance, steps. ") != mixed
        assert not any("Protocol fidelity" in note for note in content.notes)
    assert content.tables[0].note.endswith("Of fewer than 3 seeds: ratio=0.5: 2.")


def test_rows_of_other_teachers_are_not_held_against_each_other(grid, tmp_path):
    def write() -> Content:
        return write_many(tmp_path / "report", "A grid", *read_runs(find_runs(str(grid))))[1]

    content = write()
    assert any(front.quality.paired for front in content.fronts) and content.notes[0].startswith("Protocol")
    assert {front.cost.key for front in content.fronts} == {"bytes", "latency_s"}
    for file in grid.glob("ratio=0.5*/report.json"):
        report = json.loads(file.read_text())
        report["settings"] = {"fid": {"steps": 5}}
        for entry in (report["teacher"], *report["stages"]):
            entry["cost"]["image_latency_s"] = 0.25
            for of in filter(None, entry["metrics"].values()):
                of["steps"] = 5
        file.write_text(json.dumps(report))
    content = write()
    names = ["teacher of ratio=0.25", "ratio=0.25", "teacher of ratio=0.5", "ratio=0.5"]
    assert [name for name, _ in content.tables[0].rows][:2] == names[::2]
    assert [name for name, _ in content.pictures.rows] == names
    differences = next(table for table in content.tables if table.title == "Difference from ratio=0.25")
    assert "FID ↓" in differences.headings and not any(heading.startswith("PSNR") for heading in differences.headings)
    assert str(2**31) not in content.notes[1], "without the noise floors' other seeds"
    assert any(note.startswith("noise floor: the teacher with other seeds") for note in content.notes)
    assert content.notes[0].startswith("The runs have several teachers")
    assert not any(front.quality.paired or front.floor is not None for front in content.fronts)
    assert {front.cost.key for front in content.fronts} == {"bytes", "image_latency_s"}, "steps differ"
    place = [i for i, heading in enumerate(content.tables[1].headings[1:]) if heading.startswith("PSNR")]
    assert place and not any(cells[i].best for i in place for _, cells in content.tables[1].rows)


def test_a_key_of_one_method_is_no_difference_from_another():
    free = {"order": "prune", "stages.prune.method": "per_layer", "stages.prune.ratio": 0.5, "stages.prune.keep": 8}
    width = {"order": "prune", "stages.prune.method": "width", "stages.prune.ratio": 0.5, "seed": 0}
    more = {**width, "stages.prune.losses.mine": 0.5}
    both = {**width, "order": "prune, quantize", "stages.quantize.method": "packed", "stages.quantize.bits": 4}
    assert differences([free, width]) == ["stages.prune.method", "seed"]
    assert differences([width, more]) == ["stages.prune.losses.mine"], "a key of the same method"
    assert differences([width, both]) == ["order"]


def test_runs_stand_in_the_order_of_their_grid_or_by_their_numbers(grid, tmp_path):
    names = [f"ratio={ratio},seed={seed}" for ratio in (0.25, 0.5) for seed in range(3)]
    (grid / "ratio=0.5,seed=2").rename(grid / "ratio=0.25,seed=10")
    found = [folder.name for folder in find_runs(f"{grid}/ratio=0.[25]*")]
    assert found == [*names[:3], "ratio=0.25,seed=10", *names[3:5]]
    points = {"runs": [{"folder": str(grid / name)} for name in ("ratio=0.5,seed=1", "ratio=0.25,seed=10")]}
    (grid / "points.json").write_text(json.dumps(points))
    assert [folder.name for folder in find_runs(str(grid))][:3] == ["ratio=0.5,seed=1", "ratio=0.25,seed=10", names[0]]
    (grid / "points.json").write_text("{")
    assert [folder.name for folder in find_runs(f"{grid}/ratio=0.[25]*")] == found


@pytest.mark.slow  # the page of one run is opened in the usual suite
def test_what_belongs_to_a_seed_is_not_said_of_the_mean(grid, tmp_path):
    for folder in grid.glob("ratio=*,seed=?"):
        if (folder / "report.json").exists():
            report = json.loads((folder / "report.json").read_text())
            of = report["stages"][-1]["metrics"]["fid"]
            of |= {"seed": report["seed"], "blank": report["seed"], "interval_of": "fresh draws of n images"}
            (folder / "report.json").write_text(json.dumps(report))
    _, content = write_many(tmp_path / "report", "A grid", *read_runs(find_runs(str(grid))))
    notes = " ".join(content.notes)
    assert "seed 0, 1, 2" in notes
    for of_one in ("fresh draws", "two independent draws", "5th to 95th percentile"):
        assert of_one not in notes
    assert "3 images" in notes, "of a single color, over all seeds"


def test_the_pictures_are_of_one_seed(grid, tmp_path):
    (grid / "ratio=0.25,seed=0" / "report.json").unlink()  # the other seeds of this point, and all of the other point
    _, content = write_many(tmp_path / "report", "A grid", *read_runs(find_runs(str(grid))))
    assert [name for name, _ in content.pictures.rows] == ["teacher", "ratio=0.25", "ratio=0.5"]
    report = grid / "ratio=0.5,seed=1" / "report.json"
    other = json.loads(report.read_text())
    other["grid"][0]["prompt"] = "something else"
    report.write_text(json.dumps(other))
    _, content = write_many(tmp_path / "report", "A grid", *read_runs(find_runs(str(grid))))
    assert len(content.pictures.rows) == 2, "a row of other prompts is left out"


def test_the_page_in_a_browser(grid, tmp_path):
    write_many(tmp_path / "report", "Ratios", *read_runs(find_runs(str(grid))))
    with chromium() as browser:
        browser.get((tmp_path / "report" / "report.html").as_uri())
        assert len(browser.find_elements("css selector", "table.pictures tbody tr")) == 3
        images = browser.find_elements("css selector", "table.pictures img")
        assert images and all(image.get_property("naturalWidth") for image in images)
        folded = "return document.querySelector('#numbers details').open"
        states = [
            browser.execute_script(f"dispatchEvent(new Event('{event}')); {folded}") for event in ("x", "beforeprint")
        ]
        states.append(browser.execute_script(f"dispatchEvent(new Event('afterprint')); {folded}"))
        assert states == [False, True, False], "every run is printed"
        assert [h.text for h in browser.find_elements("tag name", "h2")][:3] == [
            "Cost and quality", "Failed", "Pareto fronts",
        ]  # fmt: skip
        assert not [line for line in browser.get_log("browser") if line["level"] in ("SEVERE", "WARNING")]


@pytest.mark.slow  # LaTeX takes its time
def test_the_latex_compiles(grid, tmp_path):
    write_many(tmp_path / "report", "Ratios", *read_runs(find_runs(str(grid))))
    compiles(tmp_path / "report")


def test_alternatives_of_one_run_are_points(result, tmp_path):
    write_run(tmp_path / "a", result | {"refused": {}}, {})
    write_run(tmp_path / "b", result, {})
    names = [s.line.name for s in students(read_runs(find_runs(str(tmp_path / "*")))[0])]
    assert names == ["a: prune", "a: distill", "a: quantize", "b"]


def test_names_of_runs(result, tmp_path):
    for place, ratio in enumerate((0.25, 0.5)):
        folder = tmp_path / f"2026-01-01_00-00-0{place}_000000"
        write_run(folder, result, {})
        (folder / "config.yaml").write_text(yaml.safe_dump({"stages": {"prune": {"ratio": ratio}}}))
    assert [run.name for run in read_runs(find_runs(str(tmp_path)))[0]] == ["ratio=0.25", "ratio=0.5"]
    for name in ("order=prune,seed=0-c90588ff", "order=prune,seed=1-d5001113"):
        (tmp_path / "cut").mkdir(exist_ok=True)
        write_run(tmp_path / "cut" / name, result, {})
    assert [run.name for run in read_runs(find_runs(str(tmp_path / "cut")))[0]] == [
        "order=prune, seed=0", "order=prune, seed=1",
    ]  # fmt: skip
    assert without_seed("ratio=0.5, seed=1") == "ratio=0.5" and without_seed("seed=3, bits=4, openvino") == (
        "bits=4, openvino"
    )
    assert without_seed("seed=1") == "all" and without_seed("my run") == "my run"


def test_the_same_run_twice_is_two_points_and_stages_are_compared_whatever_their_names(result, tmp_path):
    for name, bits in (("a", 8), ("b", 8), ("c", 4)):
        one = copy.deepcopy(result)
        one["stages"] = one["stages"][-1:]
        one["stages"][0]["name"] = f"int{bits}"
        write_run(tmp_path / name, one, {})
        config = {"stages": {f"int{bits}": {"kind": "quantize", "bits": bits}}, "seed": 0}
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config))
    runs = read_runs(find_runs(str(tmp_path)))[0]
    assert [one.line.name for one in all_series(students(runs))] == ["a", "b", "c"]
    assert [dict(run.config) for run in runs][1:] == [
        {"stages.quantize.kind": "quantize", "stages.quantize.bits": bits, "seed": 0, "order": "quantize"}
        for bits in (8, 4)
    ]


def test_other_orders_of_the_same_stages_are_other_points(result, tmp_path):
    orders = {"before": ["prune", "distill"], "after": ["distill", "prune"]}
    for name, order in orders.items():
        for seed in {"before": (0, 2), "after": (0, 1, 2)}[name]:  # one has failed
            one = copy.deepcopy(result) | {"seed": seed}
            by_kind = {stage["kind"]: stage for stage in one["stages"]}
            one["stages"] = [by_kind[kind] for kind in order]
            folder = tmp_path / f"{name},seed={seed}"
            write_run(folder, one, {})
            config = {"stages": {kind: {"kind": kind} for kind in order}, "seed": seed, "publish": f"me/small-{seed}"}
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
    series = all_series(students(read_runs(find_runs(str(tmp_path)))[0]))
    assert {one.line.name: sorted(one.students) for one in series} == {"after": [0, 1, 2], "before": [0, 2]}


def test_the_same_difference_in_every_seed_is_no_proof(grid):
    series = all_series(students(read_runs(find_runs(str(grid)))[0]))
    ours, theirs = ({seed: copy.deepcopy(s.line.entry) for seed, s in one.students.items()} for one in series)
    for seed, entry in ours.items():
        entry["metrics"]["r_at_1"] = metric(0.25, 0.03)
        theirs[seed]["metrics"]["r_at_1"] = metric(0.25 + 1 / 128, 0.03)  # one image more in each
    column = next(column for column in columns_of(list(ours.values())) if column.key == "r_at_1")
    assert difference(column, ours, theirs) == pytest.approx((-1 / 128, math.hypot(0.03, 0.03)))


def test_the_best_is_apart_from_every_other_row():
    column = next(column for column in columns_of([{"metrics": {"fid": metric(1.0, 1.0)}}]) if column.key == "fid")
    rows = [{"metrics": {"fid": metric(value, half)}} for value, half in ((100, 1), (105, 1), (106, 20))]
    assert best(column, rows[:2]) == [0] and best(column, rows) == []


def test_a_mistake_is_named(tmp_path):
    with pytest.raises(UserError, match=r"runs=.*/nothing"):
        find_runs(str(tmp_path / "nothing"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.json").write_text("{")
    with pytest.raises(UserError, match=r"run/report.json"):
        read_runs([tmp_path / "run"])
