# SPDX-License-Identifier: Apache-2.0
"""`pydense predict`: its options. The work is in `_predict_run`, the data in `_legends`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import _options
from ._legends import LEGENDS

_DESCRIPTION = """\
Label pictures with a network of pydense.models and a checkpoint.

INPUT is a picture, a folder of pictures, or the frames of a video by their common name, such as
frames/%05d.jpg. The result is a palette picture of labels for each.

A checkpoint is a file of PyTorch, safetensors, Caffe (.caffemodel) or MXNet (.params) in any of the
key formats that pydense.checkpoints knows. Nothing in it is ever run, and every key must fit.

What a network expects of a picture (RGB or BGR, range, mean) cannot be seen in its weights. It
comes from --preprocess, from the checkpoint if pydense wrote it, or from the format if its keys are
no other's; else the command asks for it."""


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "predict",
        help="label pictures with a network and a checkpoint",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("inputs", metavar="INPUT", nargs="+", type=Path, help="see above")
    out = parser.add_argument_group("output (a file for one picture, a folder for more)")
    out.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="the labels")
    out.add_argument("--overlay", metavar="OUT", type=Path, help="the pictures blended with them")
    out.add_argument(
        "--overlay-opacity",
        metavar="X",
        type=_options._fraction,
        default=0.5,
        help="0..1 (default 0.5)",
    )
    out.add_argument("--legend", metavar="FILE.png", type=Path, help="names and colours of labels")
    out.add_argument("-q", "--quiet", action="store_true", help="print errors and mIoU only")

    net = parser.add_argument_group("network")
    net.add_argument("--model", metavar="NAME", help="one of pydense.models.list_models()")
    net.add_argument("--checkpoint", metavar="FILE", type=Path, required=True, help="its weights")
    net.add_argument("--format", metavar="NAME", help="key format (default: the one that fits)")
    net.add_argument("--preprocess", metavar="NAME", help="see above; imagenet, caffe-fcn, ...")
    net.add_argument("--labels", choices=sorted(LEGENDS), help="names, colours and their number")
    net.add_argument(
        "--classes", metavar="N", type=_classes, help="number of classes (default: of --labels)"
    )
    net.add_argument(
        "--option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="of the network's constructor, such as ceil_mode=false (may be given often)",
    )
    net.add_argument("--batch", metavar="N", type=_batch, default=1, help="pictures at once (1)")
    net.add_argument(
        "--scales", metavar="X", nargs="+", type=_scale, default=[1.0], help="averaged (1)"
    )
    net.add_argument("--flip", action="store_true", help="average with the mirror image")
    net.add_argument("--device", metavar="NAME", default="cpu", help="cpu (default) or cuda")
    net.add_argument("--threads", metavar="N", type=_options.threads, help="CPU threads")
    net.add_argument(
        "--crf",
        action="store_true",
        help="refine by a dense CRF: the network's own if it has one (which is always run), else "
        "that of pydense refine (refused for CRF-as-RNN, which ends in one)",
    )

    reading = parser.add_argument_group("comparison and reading")
    reading.add_argument(
        "--truth",
        metavar="PATH",
        type=Path,
        help="true labels (palette, grey or colours of --labels; a folder: by name): prints mIoU",
    )
    reading.add_argument(
        "--max-pixels",
        metavar="N",
        type=_options._pixels,
        default=64_000_000,
        help="refuse larger pictures (64000000)",
    )
    parser.set_defaults(run=run)


def _classes(text: str) -> int:
    return int(_options._checked(int(text), 1 <= int(text) <= 65535, "in 1..65535"))


def _batch(text: str) -> int:
    return int(_options._checked(int(text), 1 <= int(text) <= 1024, "in 1..1024"))


def _scale(text: str) -> float:
    return float(_options._checked(float(text), 0.05 <= float(text) <= 8, "in 0.05..8"))


def run(arguments: argparse.Namespace) -> int:
    """Run `pydense predict`."""
    from ._predict_run import predict
    from ._refine import limited_threads

    with limited_threads(arguments.threads):
        return predict(arguments)
