"""Train or evaluate a model, alone or in several processes.

python train_net.py --config-file FILE [--data FOLDER] [--resume | --eval-only] [--num-gpus N] [KEY VALUE ...]
python train_net.py --config-file FILE --eval-only --results FILE [KEY VALUE ...]
torchrun --nproc-per-node N train_net.py --config-file FILE ...
"""

import argparse
from collections.abc import Sequence
from typing import Any

from querymask.command_line import add_data, load_config
from querymask.common.engine import Trainer, default_argument_parser, default_setup, first_rank, launch


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line: Detectron2's arguments, --data and --results."""
    parser = default_argument_parser()
    add_data(parser)
    parser.add_argument("--results", metavar="FILE", help="with --eval-only: evaluate this result file, not a model")
    args = parser.parse_args(arguments)
    if args.results and not args.eval_only:
        parser.error("--results evaluates a file instead of training: give --eval-only, too")
    return args


def setup(args: argparse.Namespace) -> Any:
    """The config of the run: that of the file, with the KEY VALUE pairs of the command line."""
    rank = first_rank(args.num_gpus, args.machine_rank)
    cfg = load_config(args.config_file, args.opts, data=args.data, log_rank=rank)
    cfg.freeze()
    return cfg


def main(args: argparse.Namespace, cfg: Any) -> dict[str, Any] | None:
    """What every process does; returns the results of the last evaluation."""
    default_setup(cfg, args)
    if args.results:
        return Trainer.evaluate_results(cfg, args.results)
    if args.eval_only:
        return Trainer.evaluate(cfg, resume=args.resume)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = parse_arguments()
    cfg = setup(args)
    device = cfg.MODEL.DEVICE.split(":")[0]
    launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, device, (args, cfg))
