"""The report: numbers in table and JSON, images to the bit, and what is said about noise and bias."""

import copy
import io
import json
import math

import numpy as np
import pytest
import torch
from made import metric
from PIL import Image
from rich.console import Console

from compress import report
from compress.distill import features
from compress.prune import width
from compress.quantize import int8


def printed(result, width):
    console = Console(file=io.StringIO(), width=width)
    report.print_summary(result, console)
    return console.file.getvalue()


def cells(result, row):
    """A row's cells by heading, of both tables."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in report.markdown_table(result).splitlines()
    ]
    heads = [index for index, line in enumerate(lines) if line[0] == "stage"]
    ends = [*heads[1:], len(lines)]
    return {
        name: cell
        for head, end in zip(heads, ends, strict=True)
        for line in lines[head:end]
        if line[0] == row
        for name, cell in zip(lines[head], line, strict=True)
    }


def test_markdown_holds_the_numbers(result):
    text = report.markdown_table(result)
    assert list(cells(result, "teacher")) == [
        "stage", "parameters (M)", "MACs (G)", "on disk (MB)", "peak memory (MB)", "latency (ms)", "FID ↓", "FID∞ ↓",
        "KID ↓", "emoji-clip score ↑", "R@1 ↑ (%)", "PSNR ↑ (dB)", "SSIM ↑", "latent PSNR ↑ (dB)",
    ]  # fmt: skip
    teacher, quantize = cells(result, "teacher"), cells(result, "quantize")
    assert [teacher[name] for name in ("parameters (M)", "MACs (G)", "on disk (MB)")] == ["11.5", "0.404", "46.2"]
    assert teacher["FID ↓"] == "117.2 [112.2, 122.2]" and teacher["PSNR ↑ (dB)"] == teacher["SSIM ↑"] == "–"
    assert [quantize[name] for name in ("parameters (M)", "MACs (G)", "on disk (MB)", "peak memory (MB)")] == [
        "6.80 (0.59x)", "0.238 (0.59x)", "7.10 (0.15x)", "21.3 (0.15x)",
    ]  # fmt: skip
    assert quantize["latency (ms)"] == "9.40 [9.31, 9.49] (0.76x)"
    assert quantize["FID ↓"] == "155.1 [150.1, 160.1]" and quantize["FID∞ ↓"] == "139.6"
    assert quantize["R@1 ↑ (%)"] == "25.0≈ [22.0, 28.0]"
    assert quantize["PSNR ↑ (dB)"] == "14.58 [14.18, 14.98]"
    for needle in (
        "N = 256",
        "dpmsolver++",
        "steps 20",
        "guidance 4",
        "float32",
        "emoji-clip (f58cb9b6)",
        "1000 of the real images",
    ):
        assert needle in text
    assert "biased" in text and "95 % interval" in text and "≈ marks" in text
    assert "Protocol quick version 1 with other steps. Images:" in text and "seed 0;" in text


def test_the_noise_floor_has_a_row_among_the_metrics(result):
    floor = cells(result, "noise floor")
    assert floor["FID ↓"] == "119.0≈ [114.0, 124.0]" and floor["PSNR ↑ (dB)"] == "9.00 [8.60, 9.40]"
    assert "MACs (G)" not in floor
    line = next(line for line in printed(result, 80).splitlines() if line.startswith("noise floor "))
    assert line.split()[2:] == ["–", "–", "–", "119≈", "27.0≈", "9.00"]
    del result["noise_floor"]
    assert "noise floor" not in report.markdown_table(result)


def test_a_mark_means_a_difference_from_the_teacher_within_that_of_two_draws(result):
    half = math.hypot(5.0, 5.0)
    for value, marked in ((117.2 + 0.99 * half, True), (117.2 - 0.99 * half, True), (117.2 + 1.01 * half, False)):
        result["stages"][2]["metrics"]["fid"] = metric(value, 5.0, "inception-2015-12-05")
        assert ("≈" in cells(result, "quantize")["FID ↓"]) == marked
    del result["stages"][2]["metrics"]["r_at_1"]["low"]
    assert cells(result, "quantize")["R@1 ↑ (%)"] == "25.0"
    assert "≈" in report.markdown_table(result)
    for row in (result["noise_floor"], *result["stages"]):
        row["metrics"] = {}
    assert "≈" not in report.markdown_table(result)


def test_a_mark_means_no_nearer_to_the_teacher_than_other_seeds(result):
    half = math.hypot(0.4, 0.4)
    assert "°" not in cells(result, "quantize")["PSNR ↑ (dB)"]
    assert cells(result, "prune")["PSNR ↑ (dB)"] == "5.10° [4.70, 5.50]"
    for value, marked in ((9 + 0.99 * half, True), (9 - 5 * half, True), (9 + 1.01 * half, False)):
        result["stages"][2]["metrics"]["psnr"] = metric(value, 0.4)
        assert ("°" in cells(result, "quantize")["PSNR ↑ (dB)"]) == marked
    for row, value, marked in ((2, 99.0, False), (2, 150.0, True)):  # a distance: small is near
        result["noise_floor"]["metrics"]["fid_teacher"] = metric(120.0, 2.0, "inception-2015-12-05")
        result["stages"][row]["metrics"]["fid_teacher"] = metric(value, 2.0, "inception-2015-12-05")
        assert ("°" in cells(result, "quantize")["FID to teacher ↓"]) == marked
    assert "° marks what is no nearer to the teacher's images" in report.markdown_table(result)
    assert "°" not in cells(result, "noise floor")["PSNR ↑ (dB)"]
    del result["noise_floor"]
    assert "°" not in report.markdown_table(result)


def test_fid_of_many_images_is_not_called_biased(result):
    for row in (result["teacher"], result["noise_floor"], *result["stages"]):
        row["metrics"]["fid"]["n"] = 30_000
    assert "biased" not in report.markdown_table(result)


def test_misleading_images_are_named(result):
    result["stages"][0]["metrics"]["fid"]["blank"] = 12
    result["stages"][2]["metrics"]["psnr"]["equal"] = 3
    text = report.markdown_table(result)
    assert "prune: 12 images have a single color" in text and "quantize: 3 images equal the teacher's" in text


def test_equal_latents_are_not_called_equal_images(result):
    result["stages"][2]["metrics"]["latent_psnr"] = dict(result["stages"][2]["metrics"]["psnr"], equal=12)
    assert "equal the teacher's" not in report.markdown_table(result)


def test_differing_settings_are_all_named(result):
    result["stages"][1]["metrics"]["fid"]["steps"] = 50
    assert "steps 20 / 50" in report.markdown_table(result)


@pytest.mark.parametrize("width", [60, 70, 80, 120, 200])
def test_the_printed_table_is_one_and_fits(result, width):
    text = printed(result, width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for number in ("11.5 M", "6.80 M", "7.10 MB", "1.31x", "427", "155", "14.6", "26.1", "119≈"):
        assert number in text
    assert text.count("quantize") == 1 and ("0.15x" in text) == ("[150, 160]" in text) == (width >= 80)


def test_the_short_table_takes_the_metrics_there_are(result):
    for row in (result["teacher"], result["noise_floor"], *result["stages"]):
        row["metrics"] = {key: row["metrics"][key] for key in ("kid", "ssim")} | {"pick": metric(0.2, 0.01)}
    heading = printed(result, 80).splitlines()[0]
    assert heading.split() == ["stage", "params", "size", "speed", "KID", "↓", "pick", "↑", "SSIM", "↑"]
    assert "0.0620" in printed(result, 80)


def test_cost_only(result, tmp_path):
    for row in (result["teacher"], *result["stages"]):
        row["metrics"] = {}
    del result["noise_floor"], result["manifest"]
    text = report.markdown_table(result)
    assert "FID" not in text and "PSNR" not in text and "latency" in text and "Images" not in text
    assert printed(result, 80).split()[:6] == ["stage", "params", "MACs", "size", "memory", "speed"]
    report.write_report(tmp_path, result, {})
    assert [file.name for file in (tmp_path / "images").iterdir()] == ["losses.png"]


def test_unknown_metrics_get_a_column(result):
    result["stages"][2]["metrics"]["dino_score"] = metric(0.5, 0.1)
    result["stages"][2]["metrics"]["fd_dino"] = metric(30.0, 0.1)
    assert {"dino score ↑", "fd dino ↓"} <= set(cells(result, "quantize"))


def test_plain_rows(result):
    headings, rows = report.plain_rows(result)
    assert [row[0] for row in rows] == ["teacher", "noise floor", "prune", "distill", "quantize"]
    last = dict(zip(headings, rows[-1], strict=True))
    assert last["bytes"] == 7_100_000 and last["fid"] == 155.1 and last["fid_low"] == pytest.approx(150.1)
    assert rows[0][headings.index("psnr")] is None
    assert last["fid_infinite"] == pytest.approx(139.59) and "fid_infinite_low" not in headings


def test_files(result, grids, tmp_path):
    out = tmp_path / "run"
    result["stages"][0]["metrics"]["fid"]["value"] = math.nan
    result["stages"][0]["metrics"]["fid"]["high"] = np.float32("inf")
    result["stages"][1]["coverage"]["share"] = torch.tensor(0.5)
    returned = report.write_report(out, result, grids)

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads((out / "report.json").read_text(), parse_constant=refuse)
    assert found == returned
    assert found["stages"][0]["metrics"]["fid"]["value"] is None
    assert found["stages"][0]["metrics"]["fid"]["high"] is None
    assert found["stages"][1]["coverage"]["share"] == 0.5
    assert found["teacher"]["cost"]["params"] == 11_530_000 and found["wall_seconds"] == 431.2
    assert found["settings"]["scheduler"] == "dpmsolver++" and found["versions"]["torch"] == torch.__version__
    assert found["environment"]["threads"] == torch.get_num_threads() and found["environment"]["cpu"]
    assert set(found["stages"][0]) >= {"name", "kind", "key", "cached", "seconds", "checkpoint", "coverage"}

    text = (out / "report.md").read_text()
    for name in ("grid", "size_quality", "losses"):
        assert f"(images/{name}.png)" in text
        width, height = Image.open(out / "images" / f"{name}.png").size
        assert 500 < width < 4000 and 300 < height < 4000
    assert text.split("\n")[2] == report.verdict(found)
    order = [text.index(part) for part in ("| stage | params |", "images/grid.png", "| stage | parameters", "N = 256")]
    assert order == sorted(order)
    assert "from the store" in text and "left alone: 1 (first layer)" in text and "431 s" in text
    for row, grid in grids.items():
        for index, cell in enumerate(grid):
            image = np.asarray(Image.open(out / "images" / row / f"{index}.png"))
            assert np.array_equal(image, cell["image"].permute(1, 2, 0).numpy())
    assert {path.name for path in out.iterdir()} == {"images", "report.json", "report.md"}


def test_grid_shows_every_image_unsmoothed(grids, tmp_path):
    for i, row in enumerate(grids.values()):
        for j, cell in enumerate(row):
            color = torch.tensor([40 + 60 * i, 60 + 70 * j, 9], dtype=torch.uint8)
            cell["image"] = color[:, None, None].expand(3, 64, 64)
    report.write_report(tmp_path, {"recipe": "r", "teacher": {}, "stages": []}, grids)
    colors = {
        tuple(color) for color in np.asarray(Image.open(tmp_path / "images/grid.png").convert("RGB")).reshape(-1, 3)
    }
    assert {(40 + 60 * i, 60 + 70 * j, 9) for i in range(4) for j in range(3)} <= colors


def test_writing_again_replaces(result, grids, tmp_path):
    report.write_report(tmp_path, result, grids)
    fewer = {"teacher": [dict(grids["teacher"][0], image=Image.new("RGB", (8, 8), (1, 2, 3)))]}
    report.write_report(tmp_path, result, fewer)
    assert not (tmp_path / "images/prune").exists()
    assert Image.open(tmp_path / "images/teacher/0.png").getpixel((0, 0)) == (1, 2, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"images", "report.json", "report.md"}


def test_a_failure_leaves_the_old_report(result, grids, tmp_path):
    report.write_report(tmp_path, result, grids)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    bad = copy.deepcopy(grids)
    bad["quantize"][0]["image"] = torch.zeros(3, 64, 64)
    with pytest.raises(ValueError, match="uint8"):
        report.write_report(tmp_path, result, bad)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_row_names_make_no_paths(grids, tmp_path):
    report.write_report(tmp_path / "run", {"recipe": "r", "teacher": {}, "stages": []}, {"../up": grids["teacher"]})
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


DECLARED = {"prune": width.STAGE.declared(), "distill": features.STAGE.declared(), "quantize": int8.STAGE.declared()}


def card_info(result):
    stages = [
        {name: stage[name] for name in ("name", "kind", "method", "coverage")}
        | {
            "declared": DECLARED[stage["kind"]],
            "config": {"ratio": 0.25},
            "details": {"widths": [48, 96, 144], "kept": list(range(500))},
        }
        for stage in result["stages"]
    ]
    rows = [{"name": "teacher", **result["teacher"]}, *result["stages"]]
    evaluation = {"rows": rows, "noise_floor": result["noise_floor"], "manifest": result["manifest"]}
    return {
        "recipe": "prune_distill_int8",
        "model": {"path": "org/model", "revision": None},
        "precision": "fp32",
        "stages": stages,
        "evaluation": evaluation,
        "example": {"prompt": 'a "red" heart', "seed": 7},
    }


def test_model_card(result):
    text = report.model_card(card_info(result))
    front = text.split("---\n")[1]
    assert "library_name: diffusers" in front and "base_model: org/model" in front and "- quantized" in front
    assert "41.0 % of the denoiser's parameters" in text and "ratio: 0.25" in text and "widths: [48, 96, 144]" in text
    assert "155.1 [150.1, 160.1]" in text and "| noise floor |" in text and str(list(range(500))) not in text
    assert "torch_dtype" in text and "mixed" in text
    assert "It needs `torchao`." in text and "- distillation" in front and "int8 weights save memory" in text
    pruned = report.model_card({"stages": card_info(result)["stages"][:1]})
    assert "- pruned" in pruned and "torchao" not in pruned and "not trained afterwards" in pruned


def test_usage_snippet_is_python_that_makes_the_example(result):
    text = report.usage(card_info(result), folder="DIR")
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "snippet", "exec")
    for needle in (
        '"DIR", torch_dtype=torch.float32',
        "DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)",
        json.dumps('a "red" heart'),
        "num_inference_steps=20",
        "guidance_scale=4.0",
        "manual_seed(7)",
    ):
        assert needle in code


def test_model_card_of_nothing():
    text = report.model_card({})
    assert "base_model" not in text and "not measured" in text and "torch_dtype=torch.float32" in text
    assert "base_model" not in report.model_card({"model": "/some/local/pipeline"})
    assert "base_model" not in report.model_card({"model": {"path": "embedded:emoji/pipeline"}})


def test_footer_says_in_which_format_each_file_is():
    from compress.report.footer import footer

    rows = [
        ("teacher", {"cost": {"bytes_by_dtype": {"F16": 10}}}),
        ("quantize", {"cost": {"bytes_by_dtype": {"F32": 1, "I8": 5}}}),
    ]
    assert "On disk, mostly: teacher F16, quantize I8." in footer(rows, {}, ())
    assert not any("On disk" in line for line in footer(rows[:1], {}, ()))
    rows[1][1]["cost"]["bytes_by_dtype"] = {"F32": 5}
    cast = "On disk, mostly: teacher F16, quantize F32. A cast from 32 to 16 bits alone halves a file."
    assert cast in footer(rows, {}, ())


def test_a_row_sampled_as_it_was_trained_to_be_says_so(result):
    for found in result["stages"][-1]["metrics"].values():
        if found is not None:
            found.update(steps=4, scheduler="LCMScheduler", guidance=4.0, passes=1)
    text = report.markdown_table(result)
    name = result["stages"][-1]["name"]
    assert f"{name}: sampled with LCMScheduler, 4 steps, and guidance 4 in one pass" in text
    assert "steps 20," in text
