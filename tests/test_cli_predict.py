# SPDX-License-Identifier: Apache-2.0
"""`pydense predict`: pictures, folders and frames, comparison, preprocessing, bad checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from _cli import run, run_error, run_ok, run_on_terminal, scene
from PIL import Image

from pydense import checkpoints, models
from pydense.checkpoints import PREPROCESSING, About
from pydense.cli._labelmaps import Scores, read_truth
from pydense.cli._legends import LEGENDS

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {"num_classes": 11, "width": 4}


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """A small network that tells bright from dark, and its checkpoint."""
    torch.manual_seed(0)
    model = models.UNet(**OPTIONS).eval()
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    about = About("unet", OPTIONS, "imagenet", "camvid")
    checkpoints.save(model, path, about=about)
    return model, path


@pytest.fixture
def folder(tmp_path):
    """Three pictures, the last of another size, and their names."""
    where = tmp_path / "in"
    where.mkdir()
    for index, size in enumerate(((24, 32), (24, 32), (33, 20))):
        Image.fromarray(np.roll(scene(*size), index, 1)).save(where / f"f{index:02}.png")
    return where


def expected(model, path, how="imagenet"):
    picture = torch.from_numpy(np.asarray(Image.open(path)).copy())
    return model.predict(PREPROCESSING[how](picture)[None].contiguous())[0].numpy()


def test_one_picture(net, folder, tmp_path):
    model, weights = net
    out, overlay, legend = (tmp_path / n for n in ("out.png", "over.jpg", "legend.png"))
    result = run_ok(
        *("predict", folder / "f00.png", "--checkpoint", weights, "-o", out),
        *("--overlay", overlay, "--legend", legend),
    )
    assert "input imagenet" in result.out and "labelled 1 of 1 pictures" in result.out
    picture = Image.open(out)
    assert picture.mode == "P"
    assert (np.asarray(picture) == expected(model, folder / "f00.png")).all()
    assert tuple(picture.getpalette("RGB")[3:6]) == LEGENDS["camvid"].colors[1] == (128, 0, 0)
    assert Image.open(overlay).size == (32, 24) and Image.open(legend).width > 100


@pytest.mark.parametrize("inputs", ["folder", "frames", "list"])
@pytest.mark.parametrize("batch", [1, 2])
def test_many_pictures(inputs, batch, net, folder, tmp_path):
    given = {
        "folder": [folder],
        "frames": [folder / "f%02d.png"],
        "list": sorted(folder.iterdir()),
    }
    out = tmp_path / "out"
    result = run_ok(
        *(
            "predict",
            *given[inputs],
            "--checkpoint",
            net[1],
            "-o",
            out,
            "--overlay",
            tmp_path / "o",
        ),
        *("--batch", batch, "-q"),
    )
    assert result.out == ""
    for path in folder.iterdir():
        found = np.asarray(Image.open(out / path.name))
        assert (found == expected(net[0], path)).all()
        assert (tmp_path / "o" / path.name).is_file()


def test_comparison(net, folder, tmp_path):
    truth = tmp_path / "truth"
    truth.mkdir()
    matrix = np.zeros((11, 11), dtype=int)
    for index, path in enumerate(sorted(folder.iterdir())):
        found = expected(net[0], path)
        labels = np.where(np.arange(found.shape[1]) < 9, found, (found + 1) % 11).astype(np.uint8)
        labels[0] = 11
        np.add.at(matrix, (labels[1:], found[1:]), 1)
        if index:  # index picture and colour picture
            Image.fromarray(labels).save(truth / path.name)
        else:
            colors = np.array([*LEGENDS["camvid"].colors, (0, 0, 0)], np.uint8)
            Image.fromarray(colors[labels]).save(truth / path.name)
    result = run_ok(
        *("predict", folder, "--checkpoint", net[1], "-o", tmp_path / "o", "--truth", truth)
    )
    hits = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - hits
    miou = 100 * np.mean(hits[union > 0] / union[union > 0])
    accuracy = 100 * hits.sum() / matrix.sum()
    assert f"mIoU {miou:.2f} over {(union > 0).sum()} classes" in result.out
    assert f"pixel accuracy {accuracy:.2f} (3 pictures)" in result.out
    Image.new("RGB", (32, 24), (1, 2, 3)).save(truth / "f00.png")
    result = run("predict", folder, "--checkpoint", net[1], "-o", tmp_path / "o", "--truth", truth)
    assert result.code == 1 and "colour #010203" in result.err and "labelled 2 of 3" in result.out


def test_truth_forms(tmp_path):
    def read(name, values, mode="L"):
        path = tmp_path / "x.png"
        picture = Image.fromarray(np.array([values], np.uint8))
        if mode == "P":
            picture.putpalette(bytes(range(256)) * 3)
        picture.save(path)
        legend = LEGENDS.get(name)
        return read_truth(path, (1, len(values)), legend, 5, 100).tolist()[0]

    assert read("camvid", [0, 4, 11]) == [0, 4, -1]
    assert read("ade20k", [0, 1, 5], "P") == [-1, 0, 4]
    assert read("voc", [0, 255, 3], "P") == [0, -1, 3]
    assert read("", [255, 2]) == [-1, 2]
    with pytest.raises(Exception, match="index 7"):
        read("voc", [7])


def test_scores_of_absent_classes():
    scores = Scores(4)
    scores.add(np.array([0, 0, 1, -1]), np.array([0, 2, 1, 3]))
    text = scores.lines(None)[0]
    assert "mIoU 50.00 over 3 classes" in text and "75.00 over the 2 true ones" in text
    assert "no pixel" in Scores(4).lines(None)[0]


def test_preprocessing_is_never_guessed(net, folder, tmp_path):
    model, _ = net
    weights = tmp_path / "net.pth"
    checkpoints.save(model, weights)
    call = ("predict", folder / "f00.png", "-o", tmp_path / "o.png", "--checkpoint", weights)
    assert "--model must be given" in run_error(*call, code=2)
    # Not milesial's width: the model's own is compared, and nothing is loaded in part.
    assert "does not fit unet" in run_error(*call, "--model", "unet")
    torch.save({k: torch.zeros(1) for k in ("a", "b")}, weights)
    assert "no key of the checkpoint" in run_error(*call, "--model", "unet")
    small = models.lw_refinenet_mobilenet_v2(3).eval()
    checkpoints.save(small, weights)
    call = (*call, "--model", "lw_refinenet_mobilenet_v2", "--classes", 3)
    message = run_error(*call)
    assert "give --preprocess" in message and "imagenet, or give --format" in message
    for more, how in ((("--format", "drsleep"), "imagenet"), (("--preprocess", "unit"), "unit")):
        run_ok(*call, *more)
        found = np.asarray(Image.open(tmp_path / "o.png"))
        assert (found == expected(small, folder / "f00.png", how)).all()
    assert "--preprocess must be one of" in run_error(*call, "--preprocess", "x", code=2)
    assert "format must be one of" in run_error(*call, "--format", "caffe")


def test_crf_scales_and_flip(net, folder, tmp_path):
    call = ("predict", folder / "f00.png", "--checkpoint", net[1], "-o", tmp_path / "o.png")
    run_ok(*call, "--crf", "--flip", "--scales", 1, 1.5)
    assert np.asarray(Image.open(tmp_path / "o.png")).shape == (24, 32)


def test_progress_on_a_terminal(net, folder, tmp_path):
    call = ("predict", folder / "f%02d.png", "--checkpoint", net[1], "-o", tmp_path / "o")
    shown, printed = run_on_terminal(*call, "--threads", 1)
    assert "3/3" in shown and "frames/s" in shown and "\x1b[" in shown
    assert "labelled 3 of 3 pictures" in printed and "\x1b" not in printed


def test_failures_are_aside(net, folder, tmp_path):
    (folder / "f01.png").write_bytes(b"no picture")
    Image.new("RGB", (5, 5)).save(folder / "tiny.png")  # U-Net needs 16 rows
    result = run("predict", folder, "--checkpoint", net[1], "-o", tmp_path / "o")
    assert result.code == 1 and "Traceback" not in result.err
    assert "f01.png is not a picture" in result.err and "at least 16 rows" in result.err
    assert "labelled 2 of 4 pictures" in result.out and "2 failed" in result.out
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["f00.png", "f02.png"]


def test_bad_calls(net, folder, tmp_path):
    weights = net[1]
    one, out = folder / "f00.png", tmp_path / "o.png"
    base = ("predict", one, "--checkpoint", weights, "-o", out)
    assert "must be a folder" in run_error("predict", folder, *base[2:], code=2)
    assert "one of the inputs" in run_error(*base[:5], one)
    assert "one of the inputs" in run_error(*base, "--overlay", one)
    assert "is of unet" in run_error(*base, "--model", "segnet", code=2)
    assert "--model must be one of" in run_error(*base, "--model", "nothing", code=2)
    assert "21 labels, but the network 11" in run_error(*base, "--labels", "voc")
    assert "No such file" in run_error("predict", one, "--checkpoint", tmp_path / "n", "-o", out)
    (tmp_path / "none").mkdir()
    assert "holds no picture" in run_error("predict", tmp_path / "none", *base[2:])
    assert "no frame is called" in run_error("predict", folder / "x%d.png", *base[2:])
    assert "--device" in run_error(*base, "--device", "nonsense")
    assert not out.exists()


@pytest.mark.parametrize(
    ("about", "text"),
    [
        (About("unet", {"num_classes": 11, "width": 65536}, "imagenet"), "does not fit"),
        (About("unet", {"num_classes": 2**40}, "imagenet"), "cannot be built"),
        (About("unet", {"no_such": 1, "num_classes": 2}, "imagenet"), "cannot be built"),
        (About("unet", OPTIONS, "nothing"), "unknown preprocessing"),
        (About("unet", OPTIONS, "imagenet", "nothing"), "unknown labels"),
    ],
)
def test_metadata_that_lies(about, text, net, folder, tmp_path):
    """What a file says of itself gives an error, not gigabytes."""
    path = tmp_path / "x.safetensors"
    checkpoints.save(net[0], path, about=about)
    call = ("predict", folder / "f00.png", "--checkpoint", path, "-o", tmp_path / "o.png")
    assert text in run_error(*call)


def test_legends():
    counts = {"voc": 21, "camvid": 11, "cityscapes": 19, "ade20k": 150}
    assert {k: len(v.names) for k, v in LEGENDS.items()} == counts
    for name, legend in LEGENDS.items():
        assert len(legend.colors) == len(legend.names)
        # ADE20K's road and skyscraper have one colour.
        assert len(set(legend.colors)) == len(legend.names) - (name == "ade20k")
        assert len(set(legend.names)) == len(legend.names)
    from pydense.cli._palette import voc_colors

    assert voc_colors(np.arange(21)).tolist() == [list(c) for c in LEGENDS["voc"].colors]


def test_trained_checkpoint_on_real_pictures(pictures, tmp_path):
    """The committed checkpoint labels CamVid's test pictures as it was measured to."""
    weights = ROOT / "checkpoints" / "camvid_unet8.safetensors"
    assert weights.stat().st_size < 600_000
    rows = sorted((pictures / "camvid" / "test").iterdir())[::40]
    result = run_ok(
        *("predict", *rows, "--checkpoint", weights, "-o", tmp_path),
        *("--truth", pictures / "camvid" / "testannot", "--threads", 1),
    )
    line = next(line for line in result.out.splitlines() if line.startswith("mIoU"))
    assert float(line.split()[1]) > 30
    assert float(line.split("accuracy ")[1].split()[0]) > 70
