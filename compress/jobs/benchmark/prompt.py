"""Prompts that are embedded once: the results of ``encode_prompt`` by the names of the pipeline call's arguments."""

import inspect

EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
ASKED = ("prompt", "device", "num_images_per_prompt", "do_classifier_free_guidance")


def embedding_names(kind: type) -> tuple[str, ...]:
    """Names of the results of a pipeline class's ``encode_prompt``, in order.

    Returns:
        Two names for Stable Diffusion, four for Stable Diffusion XL, which has a pooled pair too; none if the class
        returns something else or requires more arguments than :data:`ASKED`.
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
