"""What the command lines of scripts share: how they name a config, images, a device and masks, and write a page.

Importing it needs no Detectron2: benchmarks of operators do without.
"""

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the docstring of a script as it is."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_config(parser: argparse.ArgumentParser, description: str | None = None) -> None:
    """Options that name a config and override it; parse them with ``parse_intermixed_args``."""
    parser.add_argument("--config-file", required=True, metavar="FILE", help=description)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")


def add_data(parser: argparse.ArgumentParser) -> None:
    """The option that names a folder of own data, for ``load_config``."""
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="train and evaluate on this folder, whose classes the model gets (docs/your_own_data.md)",
    )


def load_config(
    file: str | os.PathLike[str] | None,
    overrides: Sequence[Any] = (),
    device: str | None = None,
    data: str | None = None,
    log_rank: int | None = None,
) -> "CfgNode":
    """The config of a file (None: the defaults) with its overrides.

    Args:
        overrides: keys and values in turn.
        device: ``MODEL.DEVICE``; where it is not given, the config's own, or "cpu" without a GPU.
        data: a folder of own data, from which data sets, classes and schedule follow where no override says them.
        log_rank: with ``data``: start the log of a run before, as the process of this rank.
    """
    from querymask.common.engine import choose_device, register_configured, start_log, use_folder
    from querymask.config import get_cfg

    cfg = get_cfg()
    if file:
        cfg.merge_from_file(os.fspath(file))
    reference = cfg.clone()
    cfg.merge_from_list(list(overrides))
    if data is None:
        register_configured(cfg)
    else:
        if log_rank is not None:
            start_log(cfg, log_rank)
        use_folder(cfg, data, reference, overrides[::2])
    if device is None:
        choose_device(cfg)
    else:
        cfg.MODEL.DEVICE = device
    return cfg


def load_run(
    folder: str | os.PathLike[str],
    overrides: Sequence[Any] = (),
    device: str | None = None,
    data: str | None = None,
) -> "CfgNode":
    """The config of a training run with its best checkpoint, where one was kept, else its last.

    Args:
        folder: OUTPUT_DIR of the run.
        overrides, device, data: as of ``load_config``. Where ``MODEL.WEIGHTS`` is overridden, the run needs none.

    Raises:
        FileNotFoundError: it has no config or no checkpoint.
    """
    from querymask.common.engine import find_checkpoint

    config = run_config(folder)
    # The mask basis is in the checkpoint
    weights = [] if "MODEL.WEIGHTS" in overrides[::2] else ["MODEL.WEIGHTS", find_checkpoint(folder)]
    return load_config(config, [*weights, "MODEL.MASK_CODING.BASIS", "", *overrides], device=device, data=data)


def run_config(folder: str | os.PathLike[str]) -> Path:
    """The file with the config of a training run.

    Raises:
        FileNotFoundError: there is none in the folder.
    """
    config = Path(folder, "config.yaml")
    if not config.is_file():
        raise FileNotFoundError(f"{folder} has no config.yaml: give the OUTPUT_DIR of a training run")
    return config


def add_images(parser: argparse.ArgumentParser, images: str = "the first N images of DATASETS.TEST") -> None:
    """Options that choose what ``read_images`` gives; ``check_images`` refuses contradictions."""
    add_data(parser)
    parser.add_argument("--num-images", type=int, metavar="N", help=images)
    parser.add_argument("--height", type=int, metavar="H", help="rows of an image of random pixels")
    parser.add_argument("--width", type=int, metavar="W", help="columns of it")


def check_images(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the script with a message if the options of ``add_images`` contradict each other."""
    if (args.height is None) != (args.width is None):
        parser.error("--height and --width belong together")
    if args.num_images is not None and (args.height is not None or args.num_images < 1):
        parser.error("--num-images must be positive, and excludes --height and --width")


def read_images(args: argparse.Namespace, cfg: "CfgNode") -> Iterator[dict[str, Any]]:
    """What a model gets, image by image: those of the test set, or one of random pixels, 4:3 where no size is said."""
    from querymask.common.data.annotations import read_dataset
    from querymask.common.data.mapper import InstanceMapper
    from querymask.common.measured_models import random_image

    if args.num_images:
        yield from map(InstanceMapper(cfg, is_train=False), read_dataset(cfg.DATASETS.TEST[0])[: args.num_images])
    else:
        side = cfg.INPUT.MIN_SIZE_TEST
        yield random_image(args.height or side, args.width or side * 4 // 3)


def parse_benchmark(
    parser: argparse.ArgumentParser, repeat: tuple[int, int] | None = None, dtypes: Sequence[str] = ()
) -> argparse.Namespace:
    """Add what benchmarks have in common, read the command line, and set the number of threads.

    Args:
        repeat: how often is timed on CUDA and on the CPU; None where that is no option.
        dtypes: to choose from; the first is the default. None are no option.
    """
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="on the CPU (1)")
    add_save(parser)
    if dtypes:
        parser.add_argument("--dtype", default=dtypes[0], choices=dtypes)
    if repeat:
        text = f"timed runs; default {repeat[0]} on CUDA, {repeat[1]} on the CPU"
        parser.add_argument("--repeat", type=int, help=text)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if repeat:
        args.repeat = args.repeat or repeat[args.device == "cpu"]
    return args


def add_save(parser: argparse.ArgumentParser) -> None:
    """The option that names the file of ``show_page``."""
    parser.add_argument("--save", type=Path, metavar="FILE", help="write what is printed to this file")


def show_page(title: str, script: str, text: str, file: Path | None) -> None:
    """Print a text in Markdown and, if there is a file, write it there below its title.

    Args:
        script: that made it, below the project's folder.
    """
    print(text)
    if file is not None:
        file.write_text(f"# {title}\n\nWritten by `{script}`.\n\n{text}\n")


def markdown_table(rows: Iterable[Sequence[str]], headers: Sequence[str]) -> str:
    """A table with names in its first column and numbers, as text, in the others."""
    align = {"colglobalalign": "right", "colalign": ("left",)}
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, **align)


def add_masks(parser: argparse.ArgumentParser, ending: str, size: int) -> None:
    """Options of scripts that learn from the masks of data sets: which, of what size, how many, and the result."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--train", nargs="+", metavar="NAME", help="registered data sets to learn from")
    source.add_argument(
        "--data", metavar="FOLDER", help="learn from this folder (docs/your_own_data.md) and test on it"
    )
    parser.add_argument("--test", nargs="+", default=[], metavar="NAME", help="data sets to test the result on")
    parser.add_argument(
        "--output", required=True, type=file_ending(ending), metavar=f"FILE{ending}", help="the file to write"
    )
    parser.add_argument("--mask-size", type=int, default=size, metavar="S", help=f"side of the masks ({size})")
    parser.add_argument("--batch-size", type=int, default=1024, metavar="B", help="masks of an update (1024)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="use the first N masks of a split (0: all)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (0)")
    parser.add_argument("--workers", type=int, default=0, help="processes that rasterise masks (0: this one)")


def parse_masks(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read a command line with the options of ``add_masks``; ``train`` and ``test`` are names where --data is given."""
    from querymask.common.data.folders import register_folder

    args = parser.parse_args(arguments)
    if args.data:
        folder = register_folder(args.data)
        args.train, args.test = [folder.names["train"]], args.test or [folder.evaluated]
    return args


def file_ending(ending: str) -> Callable[[str], Path]:
    """The type of an argument that names a file to write, with this ending."""

    def convert(text: str) -> Path:
        if Path(text).suffix != ending:
            raise argparse.ArgumentTypeError(f"{text}: the name must end in {ending}")
        return Path(text)

    return convert
