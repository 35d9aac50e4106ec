"""How much the parts measure: on a card, and in a trial run without one."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Sizes:
    """What differs between the two.

    Attributes:
        pretended: there is no card; what only a card can do is skipped by name.
        repeat, steps: timed runs of an operator; of a whole model.
        copy_mebibytes, product_side: for the card's own rates.
        images: keys of ``msda.LEVELS``.
        queries, batch: of the decoder; of all operators and models.
        active, channels: of sparse maps.
        height, width: of the models' images.
        precisions: of the models.
        loader_batches, workers: that are timed; numbers of processes to try.
        iterations, train_images, val_images: of the training; None: as the config and data set have them.
        box_ap50: that the training must reach; None: any.
    """

    pretended: bool = False
    repeat: int = 50
    steps: int = 15
    copy_mebibytes: int = 2048
    product_side: int = 8192
    images: tuple[str, ...] = ("800x1066", "400x533")
    queries: int = 300
    batch: int = 2
    active: int = 40000
    channels: tuple[int, ...] = (128, 64, 32)
    height: int = 800
    width: int = 1066
    precisions: tuple[str, ...] = ("fp32", "TF32", "bf16", "fp16")
    loader_batches: int = 40
    workers: tuple[int, ...] = (0, 4, 12)
    iterations: int | None = None
    train_images: int | None = None
    val_images: int | None = None
    # The same training has 42.4 on a CPU (docs/results/README.md); sums in another order move it by a few points
    box_ap50: float | None = 35.0

    def model_settings(self, method: str, backbone: bool = True) -> list[Any]:
        """Keys of a method's config and values in turn: in a trial run those that the tests make models small with.

        Args:
            backbone: with those of backbones, of any kind.
        """
        if not self.pretended:
            return []
        support = str(ROOT / "tests" / "support")
        if support not in sys.path:
            sys.path.append(support)
        from tiny_configs import BACKBONES, REDUCED

        chosen = {**(BACKBONES if backbone else {}), **REDUCED[method]}
        return [item for pair in chosen.items() for item in pair]


CARD = Sizes()
TRIAL = Sizes(
    pretended=True,
    repeat=1,
    steps=1,
    copy_mebibytes=1,
    product_side=16,
    images=("64x96",),
    queries=5,
    active=400,
    channels=(8,),
    height=64,
    width=96,
    precisions=("fp32", "bf16"),
    loader_batches=2,
    workers=(0,),
    iterations=2,
    train_images=16,
    val_images=2,
    box_ap50=None,
)
