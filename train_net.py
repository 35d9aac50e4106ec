"""Train or evaluate a model: python train_net.py --config-file FILE [--eval-only] [--resume] [KEY VALUE ...]."""

import argparse
from typing import Any

from querymask import get_cfg
from querymask.common.engine import (
    StrictCheckpointer,
    Trainer,
    check_num_classes,
    choose_device,
    default_argument_parser,
    default_setup,
    launch,
)


def setup(args: argparse.Namespace) -> Any:
    """The config of a run: file, then the overrides of the command line."""
    cfg = get_cfg()
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    choose_device(cfg)
    cfg.freeze()
    return cfg


def main(args: argparse.Namespace, cfg: Any) -> dict:
    """Train, or evaluate with --eval-only; returns the metrics."""
    default_setup(cfg, args)
    if args.eval_only:
        check_num_classes(cfg, cfg.DATASETS.TEST)
        model = Trainer.build_model(cfg)
        StrictCheckpointer(model, cfg.OUTPUT_DIR, cfg=cfg).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        return Trainer.test(cfg, model)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    cfg = setup(args)
    launch(
        main,
        args.num_gpus,
        args.num_machines,
        args.machine_rank,
        args.dist_url,
        device=cfg.MODEL.DEVICE.split(":")[0],
        args=(args, cfg),
    )
