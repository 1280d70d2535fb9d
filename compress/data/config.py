"""Where images and captions are, as a config says it."""

from dataclasses import dataclass

from compress.assets import PREFIX, resolve
from compress.data.framing import Framing
from compress.errors import bad_value

ON_ERROR = ("stop", "skip")


@dataclass(frozen=True)
class DataConfig:
    """Where images and captions are. What is None is found where it is unambiguous.

    Attributes:
        path: A parquet file, a folder of parquet files, a folder of images with ``metadata.csv``, ``.jsonl`` or
            ``.parquet`` (the ``imagefolder`` of ``datasets``) or with a ``.txt`` file beside each image, a ``.tar``
            file or a folder of them (WebDataset), or a hub id; prompts without images in a ``.txt`` (one a line),
            ``.csv`` or ``.jsonl`` file. ``embedded:`` means inside the package.
        revision: Branch, tag or commit of a hub id; None is the newest.
        image_column: Column of images; None: the one of that type; ``none``: the captions are used without images.
        text_column: Column of captions; None: ``text``, ``caption``, ``prompt`` or ``txt``, or the only column of text.
            A dot separates the keys of nested columns of tar files and of the hub: ``json.caption``.
        split_column: Column that says which split a row belongs to; None: ``split`` where there is one.
        train_split: The split to train on, of ``split_column``, of the hub or by the folders' names; None: ``train``
            where there are splits; ``all``: all rows.
        reference: Safetensors file of the real images' Inception features, None to compute them from the training
            images, or ``auto``: the file that belongs to the embedded data, None for other data.
        on_error: What becomes of an image that cannot be read or has no caption: ``stop`` refuses the data, ``skip``
            leaves the image out and counts it.
        resize: See :class:`compress.data.framing.Framing`, as ``crop`` and ``flip``; they concern training alone.
        crop: See ``resize``.
        flip: See ``resize``.
        prompts: A ``.txt``, ``.csv`` or ``.jsonl`` file of prompts for methods that train on the teacher's own samples;
            None: the captions.
        styles: Each prompt for such samples is put into each of these, in the place of ``{}``: ``a {} in flat style``;
            empty: prompts as they are.
    """

    path: str
    revision: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    split_column: str | None = None
    train_split: str | None = None
    reference: str | None = "auto"
    on_error: str = "stop"
    resize: int | None = None
    crop: str = "center"
    flip: bool = False
    prompts: str | None = None
    styles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks the values without the data.

        Raises:
            UserError: Images and captions are to come from one column, or a value is unknown or out of range.
        """
        self.framing  # noqa: B018 - checks its values
        for style in self.styles:
            if "{}" not in style:
                raise bad_value("styles", style, "texts with {} in the place of the prompt")
        if self.text_column is not None and self.text_column == self.image_column:
            raise bad_value("text_column", self.text_column, "another column than image_column")
        if self.on_error not in ON_ERROR:
            raise bad_value("on_error", self.on_error, " or ".join(ON_ERROR))

    @property
    def reference_file(self) -> str | None:
        """The file that ``reference`` stands for."""
        if self.reference == "auto":
            return resolve(f"{PREFIX}emoji/inception.safetensors") if self.is_embedded else None
        return None if self.reference is None else resolve(self.reference)

    @property
    def framing(self) -> Framing:
        """How images are brought to the model's size for training."""
        return Framing(self.resize, self.crop, self.flip)

    @property
    def is_embedded(self) -> bool:
        """Whether the data is the package's."""
        return self.path.startswith(PREFIX)
