"""What the points of a grid are called."""

import re

from compress.grid.points import LONGEST, folder_name, varied


def test_what_varies_is_told_from_the_rest() -> None:
    job = ["recipe=prune", "seed=2", "stages.prune.ratio=0.1", "prune@stages.prune=taylor"]
    assert varied(job, ["stages.prune.ratio", "seed"]) == ["stages.prune.ratio=0.1", "seed=2"]


def test_folders_are_named_after_what_varies() -> None:
    assert folder_name(["stages.prune.ratio=0.4", "seed=1"]) == "ratio=0.4,seed=1"
    assert folder_name(["prune@stages.prune=taylor", "+prune/importance@stages.prune.importance=l1"]) == (
        "prune=taylor,importance=l1"
    )
    assert folder_name(["stages.prune.seed=3", "seed=1"]) == "stages.prune.seed=3,seed=1"


def test_names_are_safe_short_and_differ() -> None:
    names = [
        folder_name([override])
        for override in ("model.path=/a/sd15", "model.path=/b/sd15", "stages.prune.ratio=[0.1,0.2]", "seed='../1'")
    ]
    assert re.fullmatch(r"path=sd15-[0-9a-f]{8}", names[0]) and names[2].startswith("ratio=0.1_0.2-")
    assert len(set(names)) == 4 and all(re.fullmatch(r"[\w.,=+-]+", name) and ".." not in name for name in names)
    long = [folder_name([f"stages.prune.key{i}={i + j}" for i in range(30)]) for j in range(2)]
    assert long[0] != long[1] and max(map(len, long)) <= LONGEST
