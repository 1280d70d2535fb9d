import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from omegaconf import OmegaConf

from compress.config.compose import compose, place_choices, sentence
from compress.config.folders import conf_folder, default_out, known_kinds, known_methods, recipe_files
from compress.config.values import build
from compress.errors import UserError, bad_value
from compress.run.config import RunConfig, to_run_config
from compress.stage import Stage


def run_config(*overrides: str) -> RunConfig:
    return to_run_config(compose(["recipe=prune_distill_int8", *overrides]))


def message(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        run_config(*overrides)
    return str(caught.value)


def test_stages_keep_their_order_and_types() -> None:
    config = run_config("stages.prune.ratio=0.4", "stages.distill.steps=80", "seed=1", "out=a/b")
    assert [(stage.name, stage.kind, stage.method) for stage in config.stages] == [
        ("prune", "prune", "width"),
        ("distill", "distill", "features"),
        ("quantize", "quantize", "w8a8"),
    ]
    assert config.stages[0].config.ratio == 0.4
    assert config.stages[1].config.steps == 80
    assert (config.seed, config.out, config.store) == (1, Path("a/b"), Path("runs/store"))
    assert config.recipe_name == "prune_distill_int8"


def test_a_stage_can_be_left_out() -> None:
    assert [stage.name for stage in run_config("~stages.distill").stages] == ["prune", "quantize"]


def test_two_default_folders_in_one_second_differ() -> None:
    assert default_out("prune") != default_out("prune")


@pytest.mark.parametrize("name", sorted(recipe_files()))
def test_every_recipe_composes_and_says_what_it_does(name: str) -> None:
    file = recipe_files()[name]
    orders = re.findall(r"\[[^]]*\]", str(OmegaConf.select(OmegaConf.load(file), "hydra.sweeper.params.order")))
    for order in orders or ["null"]:
        config = compose([f"recipe={name}", f"order={order}"])
        assert config.recipe_name == name.rpartition("/")[2]
        if config.job == "run":
            assert to_run_config(config).stages
    assert sentence(file)[-1] in ".?"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["recipe=prune_dist"], ["recipe=prune_dist", "did you mean prune_distill?", "int8"]),
        (["model=emojy"], ["model=emojy", "emoji", "model.path="]),
        (["stages.prune.ratoi=0.5"], ["stages.prune.ratoi", "did you mean ratio?", "importance"]),
        (["stages.prun.ratio=0.5"], ["stages.prun:", "did you mean prune?"]),
        (["presicion=bf16"], ["presicion", "did you mean precision?"]),
        (["seed.x=1"], ["seed.x", "seed is a value"]),
        (["quantize=int4", "stages.quantize.components={vae: {}}"], ["stages.quantize.components", "with a plus"]),
        (["stages.prune.ratio=[1,"], ["stages.prune.ratio=[1,", "cannot be read"]),
        (["stages.prune.ratio"], ["stages.prune.ratio", "expected KEY=VALUE"]),
        (["prune=magnitud"], ["prune=magnitud:", "did you mean magnitude?"]),
        (["prune/importanc=l1"], ["prune/importanc=l1: no such choice (did you mean importance?)"]),
        (["distill/importance=l1"], ["distill/importance=l1: no such choice; of distill there are none"]),
        (["prune/importance=tailor"], ["prune/importance=tailor:", "did you mean taylor?"]),
        (["prune@stages.prun=magnitude"], ["prune@stages.prun=magnitude", "prune, distill, quantize", "named prun:"]),
        (["+prune@stages.again=magnitude", "prune/importance@stages.agai=l1"], ["named agai"]),
        (["prune@stages.prune=magnitud"], ["magnitud", "did you mean magnitude?"]),
        (["~stages.nothing"], ["stages.nothing", "prune, distill, quantize"]),
        (["+stages.prune.ratoi=1"], ["stages.prune.ratoi", "did you mean ratio?"]),
        (["+modle=1"], ["modle", "did you mean model?"]),
        (["stages.prune.ratio=1.2"], ["stages.prune.ratio=1.2: expected"]),
        (["stages.prune.ratio=abc"], ["stages.prune.ratio=abc: expected a number"]),
        (["stages.distill.steps=abc"], ["stages.distill.steps=abc: expected a whole number"]),
        (["stages.distill.steps=1.5"], ["stages.distill.steps=1.5: expected a whole number"]),
        (["stages.distill.steps=null"], ["stages.distill.steps=None: expected a whole number"]),
        (["stages.distill.steps=0"], ["stages.distill.steps=0: expected"]),
        (["stages.prune.kind=prun"], ["stages.prune.kind=prun", "did you mean prune?", "quantize"]),
        (["stages.prune.method=magic"], ["stages.prune.method=magic", "width"]),
        (["~stages.prune.method"], ["stages.prune.method is missing", "width"]),
        (["stages.prune=1"], ["stages.prune"]),
        (["~stages.prune", "~stages.distill", "~stages.quantize"], ["stages", "at least one stage"]),
        (["seed=-1"], ["seed=-1", "2^32"]),
        (["seed=abc"], ["seed=abc", "a whole number"]),
        (["device=tpu"], ["device=tpu", "cuda"]),
        (["device=cuda:x"], ["device=cuda:x"]),
        (["precision=int8"], ["precision=int8", "fp32 or bf16 or fp16"]),
        (["evaluate.images=abc"], ["evaluate.images=abc"]),
        (["track.backend=tensorboard"], ["track.backend=tensorboard", "wandb"]),
        (["data.image_column=[1]"], ["data.image_column=[1]", "text"]),
        (["out="], ["out="]),
    ],
)
def test_a_mistake_is_named_with_its_key_and_remedy(overrides: list[str], parts: list[str]) -> None:
    text = message(*overrides)
    assert all(part in text for part in parts), text
    assert "\n" not in text


def test_distilling_after_quantizing_is_refused_before_anything_runs() -> None:
    text = message("~stages.distill", "+distill@stages.again=features")
    assert "stages.again" in text
    assert "stages.quantize" in text
    assert "before it" in text


def test_a_training_for_any_number_of_steps_does_not_follow_one_for_few() -> None:
    text = message("recipe=prune_distill_lcm_int8", "order=[few_steps,distill]")
    assert "stages.distill (distill=features) would undo the few steps that stages.few_steps (distill=lcm)" in text
    assert "few steps" in message("recipe=prune_distill_lcm_int8", "quantize=qat_int8")


def test_a_choice_is_for_the_stage_of_its_kind() -> None:
    config = run_config("prune=taylor", "prune/importance=diff_pruning", "stages.prune.importance.threshold=0.1")
    assert (config.stages[0].name, config.stages[0].method) == ("prune", "width")
    assert (config.stages[0].config.importance.name, config.stages[0].config.importance.threshold) == (
        "diff_pruning",
        0.1,
    )
    assert run_config("stages.prune.importance=l1").stages[0].config.importance.name == "l1"
    words = ["recipe=prune", "prune=a,b", "model=emoji", "~prune", "prune@stages.x=y", "stages.prune.ratio=1", "prune"]
    assert place_choices(words) == ["recipe@_global_=prune", "prune@stages.prune=a,b", *words[2:]]


@pytest.mark.parametrize("name", ["b\u00fc", "it's", "p(1)", "a=b", 'x{y}"z', "with space", "back\\slash"])
def test_a_folder_may_have_any_name(name: str) -> None:
    assert compose(["recipe=score", f"images={name}"]).images == name


def test_a_recipe_without_such_a_stage_says_which_it_has() -> None:
    with pytest.raises(UserError) as caught:
        compose(["recipe=int8", "prune=taylor"])
    text = str(caught.value)
    assert "the recipe's stages are quantize, and none is named prune" in text
    assert "+prune@stages.NAME=" in text


@dataclass(frozen=True)
class Inner:
    """A nested config."""

    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.rate > 1:
            raise bad_value("rate", self.rate, "at most 1")


@dataclass(frozen=True)
class Outer:
    """One field of each type."""

    needed: int
    mode: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = ()
    either: float | list[float] = 0.5
    inner: Inner = Inner()


def test_build_converts_nested_and_union_types() -> None:
    built = build(Outer, {"needed": "3", "sizes": [1, 2], "either": [0.5], "inner": {"rate": 1}}, "x")
    assert built == Outer(3, "a", (1, 2), [0.5], Inner(1.0))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "x.needed is missing: expected a whole number"),
        ({"needed": "???"}, "x.needed is missing: expected a whole number"),
        ({"needed": 1, "mode": "c"}, "x.mode=c: expected a or b"),
        ({"needed": 1, "inner": {"rate": 2}}, "x.inner.rate=2.0: expected at most 1"),
        ({"needed": 1, "inner": {"rat": 2}}, "x.inner.rat: no such key (did you mean rate?); known: rate"),
        ({"needed": 1, "inner": 3}, "x.inner=3: expected keys and values"),
        ({"needed": 1, "sizes": ["a"]}, "x.sizes=['a']: expected a list of whole numbers"),
    ],
)
def test_build_names_the_whole_key(values: dict[str, object], text: str) -> None:
    with pytest.raises(UserError) as caught:
        build(Outer, values, "x")
    assert str(caught.value) == text


def test_every_method_has_a_choice_and_every_choice_a_method() -> None:
    for kind in known_kinds():
        choices = sorted(file.stem for file in (conf_folder() / kind).glob("*.yaml"))
        composed = compose(["recipe=int8", "~stages.quantize", *(f"+{kind}@stages.{name}={name}" for name in choices)])
        stages = to_run_config(composed, alternatives=True).stages
        assert {stage.name for stage in stages} == set(choices)
        for stage in stages:
            assert stage.kind == kind
            keys = {"kind", "method", *dataclasses.asdict(stage.config)}
            assert set(composed.stages[stage.name]) == keys, stage.name  # every key is shown and explained
        assert {stage.method for stage in stages} == set(known_methods(kind))


def test_nothing_follows_an_artifact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.quantize.w8a8.STAGE", Stage(version=1, leaves="artifact"))
    monkeypatch.setattr("compress.distill.features.STAGE", Stage(version=1, needs="any"))
    assert "needs a model, but stages.quantize" in message("~stages.distill", "+distill@stages.again=features")
    monkeypatch.setattr("compress.quantize.w8a8.STAGE", Stage(version=1, leaves="quantized"))
    assert [stage.name for stage in run_config("~stages.distill", "+distill@stages.again=features").stages] == [
        "prune",
        "quantize",
        "again",
    ]
