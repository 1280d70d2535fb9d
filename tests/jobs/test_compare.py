"""Stages that are alternatives: each from the teacher, all in one report."""

import json
from pathlib import Path

import pytest

import compress.quantize.packed
from compress.config.compose import compose
from compress.errors import UserError
from compress.jobs import run_job

ALTERNATIVES = [
    f"~stages.{name}" for name in compose(["recipe=compare_quantization"]).stages if name not in ("int8", "int4", "nf4")
]


def test_each_choice_is_a_row_and_one_that_fails_costs_its_row_alone(
    tmp_path: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = compress.quantize.packed.choose_schemes

    def refuse(model: object, config: compress.quantize.packed.Config) -> object:
        if config.format == "nf4":
            raise UserError("needs the package nothing")
        return real(model, config)  # type: ignore[arg-type]

    monkeypatch.setattr(compress.quantize.packed, "choose_schemes", refuse)
    out, store = tmp_path / "out", tmp_path / "store"
    overrides = ["recipe=compare_quantization", *tiny_overrides, *ALTERNATIVES, f"out={out}", f"store={store}"]
    run_job(compose(overrides))
    report = json.loads((out / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["int8", "int4"]
    assert list(report["refused"]) == ["nf4"] and "needs the package nothing" in report["refused"]["nf4"]
    int8, int4 = (stage["cost"]["bytes"] for stage in report["stages"])
    assert int4 < int8 < report["teacher"]["cost"]["bytes"]
    printed = capsys.readouterr().out
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    for written in (page, text):
        assert "2 alternatives, each made from the teacher alone: int8, int4; not run: nf4." in written
        assert "needs the package nothing" in written
    assert "nf4: not run: " in printed and str(out / "report.md") in printed
    assert json.loads((out / "int4" / "report.json").read_text())["teacher"]["cached"], "measured once"


def test_nothing_that_runs_is_an_error(
    tmp_path: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: object, config: object) -> None:
        raise UserError("no")

    monkeypatch.setattr(compress.quantize.packed, "choose_schemes", refuse)
    kept = [*ALTERNATIVES, "~stages.int8", f"out={tmp_path / 'out'}", f"store={tmp_path / 'store'}"]
    with pytest.raises(UserError, match="int4: stages.int4"):
        run_job(compose(["recipe=compare_quantization", *tiny_overrides, *kept]))
