"""What a pipeline's class says of itself."""

import diffusers
import pytest

from compress.errors import UserError
from compress.models.call import check_draws, needs, refusal

DRAWS = [
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "SanaPipeline",
    "PixArtAlphaPipeline", "LatentConsistencyModelPipeline", "FluxKontextPipeline", "Lumina2Pipeline",
]  # fmt: skip
NEEDS = {
    "StableDiffusionImg2ImgPipeline": ["image"],
    "StableDiffusionInpaintPipeline": ["image", "mask_image"],
    "FluxFillPipeline": ["mask_image"],
    "StableDiffusionUpscalePipeline": ["image"],
    "StableDiffusionDepth2ImgPipeline": ["image"],
    "StableDiffusionControlNetPipeline": ["image"],
    "StableDiffusionGLIGENPipeline": ["gligen_phrases", "gligen_boxes"],
    "FluxControlPipeline": ["control_image"],
    "DiTPipeline": ["class_labels"],
}


@pytest.mark.parametrize("name", DRAWS)
def test_pipelines_that_draw_from_a_prompt(name: str) -> None:
    assert refusal(getattr(diffusers, name)) is None


@pytest.mark.parametrize(("name", "missing"), NEEDS.items())
def test_pipelines_that_need_more_are_refused_where_images_are_asked_for(name: str, missing: list[str]) -> None:
    found = getattr(diffusers, name)
    assert needs(found) == missing
    check_draws(found, images=0)
    with pytest.raises(UserError, match=rf"evaluate\.images=256: {name} needs {' and '.join(missing)} besides .*=cost"):
        check_draws(found, images=256)


def test_pipelines_without_a_prompt_and_for_videos_are_refused() -> None:
    assert refusal(diffusers.DDPMPipeline) == "DDPMPipeline takes no prompt"
    assert needs(diffusers.DDPMPipeline) == []
    assert refusal(diffusers.LTXPipeline) == "LTXPipeline draws videos"
