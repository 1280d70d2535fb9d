"""Prompts that are embedded once: what a pipeline's ``encode_prompt`` gives, by the names its call takes it under."""

import inspect

EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
ASKED = ("prompt", "device", "num_images_per_prompt", "do_classifier_free_guidance")


def embedding_names(kind: type) -> tuple[str, ...]:
    """Names of what ``encode_prompt`` of a class of pipelines gives, in that order.

    Returns:
        The two of Stable Diffusion, or the four of Stable Diffusion XL, whose text encoders give a pooled pair too;
        none where the class gives something else or wants to be told more than :data:`ASKED`.
    """
    if not hasattr(kind, "encode_prompt"):
        return ()
    encoding = inspect.signature(kind.encode_prompt).parameters
    taken = inspect.signature(kind.__call__).parameters
    needed = {name for name, parameter in encoding.items() if parameter.default is parameter.empty} - {"self"}
    known = needed <= set(ASKED) <= set(encoding) and set(EMBEDDINGS[:2]) <= set(taken)
    if not known or any("attention_mask" in name for name in taken):
        return ()
    return EMBEDDINGS if set(EMBEDDINGS) <= set(taken) else EMBEDDINGS[:2]
