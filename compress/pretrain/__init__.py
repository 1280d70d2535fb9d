"""The training of the embedded default: its pictures, autoencoder, CLIP and teacher.

Nothing here is needed to compress a model. It is what made the files in ``compress/assets``, kept so that
anyone can make them again with one command each; see the ``train_emoji_*`` recipes.
"""
