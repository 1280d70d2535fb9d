"""Keys of the training that change how it computes: its losses stay."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

import compress.distill.validation as validation_module
from compress.distill.compiled import check_compiler
from compress.distill.guidance import add_scale_input
from compress.distill.placement import idle_parts, placed
from compress.distill.training import Validation
from compress.errors import UserError
from compress.runtime import inductor, openvino
from tests.distill.worker import CONFIG, distilled
from tests.tiny import tiny_pipeline

SHORT = replace(CONFIG, steps=4, save_every=4)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Losses of a short training."""
    return curves(tmp_path_factory.mktemp("plain"))


def curves(folder, **values):
    """Losses at each point of every curve."""
    _, report = distilled(folder, replace(SHORT, **values))
    return {name: [value for _, value in curve] for name, curve in report.curves.items()}


def test_teacher_in_openvino_gives_the_same_losses(tmp_path, plain):
    found = curves(tmp_path, teacher_engine="openvino")
    for name, values in plain.items():
        assert found[name] == pytest.approx(values, abs=1e-5)


def test_teacher_stays_eager_where_auto_finds_no_openvino(tmp_path, plain, monkeypatch):
    monkeypatch.setattr(openvino, "missing", lambda: "is not installed")
    assert curves(tmp_path, teacher_engine="auto") == plain
    with pytest.raises(UserError, match="teacher_engine=openvino: expected eager: OpenVINO is not installed"):
        curves(tmp_path, teacher_engine="openvino")


def test_teacher_that_openvino_cannot_run_stays_eager_with_auto(tmp_path, plain, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise UserError("engine=openvino: its outputs differ")

    monkeypatch.setattr(openvino.OpenVINOModule, "__call__", fail)
    assert curves(tmp_path / "auto", teacher_engine="auto") == plain
    assert "the teacher runs in eager mode: engine=openvino: its outputs differ" in capsys.readouterr().err
    with pytest.raises(UserError, match="its outputs differ"):
        curves(tmp_path / "openvino", teacher_engine="openvino")


def test_gradient_checkpointing_gives_the_same_losses(tmp_path, plain):
    assert curves(tmp_path, gradient_checkpointing=True)["loss"] == pytest.approx(plain["loss"], abs=1e-6)


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request, monkeypatch):
    """What compiles: the same graphs, but without a compiler's minutes in the suite."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **keys: compile_(self, backend=request.param, **keys))
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    yield request.param
    torch._dynamo.reset()


def test_compiled_student_gives_the_same_losses(tmp_path, plain, backend):
    validation = Validation(prompts=["cat", "dog"], every=2, steps=2)  # of another shape, so not compiled
    found = curves(tmp_path, compile=True, validation=validation)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for name, values in plain.items():
        assert found[name] == pytest.approx(values, abs=1e-5)


def test_a_compiler_that_fails_or_loses_gradients_is_not_used(tmp_path, plain, monkeypatch, capsys):
    def loses(self, **keys):
        self._compiled_call_impl = lambda *args, **kwargs: [
            torch.detach(x) * 1 for x in self._call_impl(*args, **kwargs)
        ]

    monkeypatch.setattr(torch.nn.Module, "compile", loses)
    assert curves(tmp_path, compile=True) == plain
    assert "torch.compile gives other gradients here" in capsys.readouterr().err

    def fails(self, **keys):
        self._compiled_call_impl = lambda *args, **kwargs: torch.ones(2).view(3)

    monkeypatch.setattr(torch.nn.Module, "compile", fails)
    assert curves(tmp_path / "fails", compile=True) == plain
    assert "torch.compile fails here (shape '[3]' is invalid" in capsys.readouterr().err


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(inductor, "missing", lambda device: "needs a C++ compiler")
    with pytest.raises(UserError, match="compile=True: expected false: torch.compile needs a C\\+\\+ compiler"):
        check_compiler(True)
    check_compiler(False)


def test_validation_images_follow_the_training_and_change_nothing(tmp_path, plain):
    drawn = []
    validation = Validation(prompts=["cat", "dog"], every=2, steps=2)
    pipeline, report = distilled(
        tmp_path, replace(SHORT, validation=validation), show=lambda *image: drawn.append(image)
    )
    assert [value for _, value in report.curves["loss"]] == plain["loss"]
    assert [(tuple(images.shape), prompts, step) for images, prompts, step in drawn] == [
        ((2, 3, 16, 16), ["cat", "dog"], 2),
        ((2, 3, 16, 16), ["cat", "dog"], 4),
    ]
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert pipeline.unet.training == tiny_pipeline().unet.training


def test_validation_images_have_the_guidance_that_is_trained(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        validation_module, "sample", lambda _, __, ___, config: asked.append(config.guidance) or torch.zeros(1, 3, 8, 8)
    )
    validation = Validation(prompts=["cat"], every=1, steps=1, guidance=4.0)
    for student, trained, expected in [
        (tiny_pipeline(), None, 4.0),
        (tiny_pipeline(), (5.0, 5.0), 1.0),  # as a transformer: its one pass is guided, so there is no second
        (tiny_pipeline(), (5.0, 8.0), 5.0),
    ]:
        if expected == 5.0:
            add_scale_input(student.unet, trained)
        validation_module.drawing(student, validation, 0, lambda *image: None, tmp_path, trained)(1)
        assert asked.pop() == expected


def test_models_that_a_training_does_not_use_leave_the_device():
    pipeline, moves = tiny_pipeline(), []
    for name in ("text_encoder", "vae", "unet"):
        part = getattr(pipeline, name)
        part.to = lambda device, name=name: moves.append((name, str(device)))
    idle = idle_parts(pipeline, pipeline, used=[pipeline.vae])
    with placed(idle, "meta"):
        assert moves == [("text_encoder", "meta")]
    assert moves[1:] == [("text_encoder", "cpu")]


def test_validation_images_go_to_the_folder_where_nothing_shows_them(tmp_path):
    validation = Validation(prompts=["cat", "dog"], every=4, steps=1)
    distilled(tmp_path, replace(SHORT, validation=validation))
    with Image.open(tmp_path / "validation" / "step-000004.png") as image:
        assert image.size == (32, 16)
        assert image.info["prompts"] == "cat\ndog"
