# SPDX-License-Identifier: Apache-2.0
"""`pydense refine`: pydensecrf's golden pictures, parameters, extra outputs, kinds of photos."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _cli import load, rough_labels, run_error, run_ok, save, save_palette, scene
from PIL import Image, ImageOps

import pydense.densecrf as dcrf
from pydense.cli._palette import draw_borders, voc_colors
from pydense.cli._pictures import read_image
from pydense.densecrf import utils


@pytest.fixture(scope="session")
def examples(pictures: Path) -> Path:
    folder = pictures / "crf" / "pydensecrf"
    if not folder.is_dir():
        pytest.skip("no pydensecrf example pictures in PYDENSE_TEST_DATA")
    return folder


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A photo, a grey index annotation and the path of the output."""
    image = save(tmp_path / "image.png", scene())
    return image, save(tmp_path / "labels.png", rough_labels()), tmp_path / "out.png"


def differing(first: Path, second: Path) -> int:
    return int((load(first, "RGB") != load(second, "RGB")).any(axis=2).sum())


@pytest.mark.parametrize("number", [1, 2, 3])
def test_golden_pictures_of_pydensecrf(examples: Path, tmp_path: Path, number: int) -> None:
    photo, annotation = examples / f"im{number}.png", examples / f"anno{number}.png"
    outputs = [tmp_path / "default.png", tmp_path / "spelled.png"]
    run_ok("refine", photo, annotation, "-o", outputs[0])
    run_ok(
        *("refine", photo, annotation, "-o", outputs[1], "--gt-prob", 0.7, "--iterations", 5),
        *("--gaussian-sxy", 3, "--gaussian-compat", 3, "--bilateral-sxy", 80),
        *("--bilateral-srgb", 13, "--bilateral-compat", 10, "--normalization", "symmetric"),
        *("--threads", 1, "--annotation-format", "colors"),
    )
    for output in outputs:
        assert load(output).shape == load(examples / f"out{number}.png").shape
        assert differing(output, examples / f"out{number}.png") == 0


@pytest.mark.parametrize(("number", "changed"), [(1, 132), (2, 182), (3, 58)])
def test_golden_pictures_notice_the_iterations(
    examples: Path, tmp_path: Path, number: int, changed: int
) -> None:
    """Ten iterations change as many pixels as they do in pydensecrf itself."""
    photo, annotation = examples / f"im{number}.png", examples / f"anno{number}.png"
    run_ok("refine", photo, annotation, "-o", tmp_path / "out.png", "--iterations", 10)
    assert abs(differing(tmp_path / "out.png", examples / f"out{number}.png") - changed) <= 1


def test_golden_picture_of_older_code(examples: Path, tmp_path: Path) -> None:
    """The published out1-b.png stems from older code: 13 pixels differ in pydensecrf too."""
    annotation = examples / "anno1-b.png"
    run_ok("refine", examples / "im1.png", annotation, "-o", tmp_path / "out.png")
    assert differing(tmp_path / "out.png", examples / "out1-b.png") <= 13


@pytest.mark.parametrize("normalization", ["symmetric", "before", "after", "none"])
def test_parameters_reach_the_crf(files: tuple[Path, Path, Path], normalization: str) -> None:
    image, annotation, output = files
    marginals = output.with_name("q.npy")
    weights = (0.02, 0.03) if normalization == "none" else (2.0, 4.0)
    run_ok(
        *("refine", image, annotation, "-o", output, "--probabilities", marginals),
        *("--gaussian-sxy", 2, "--gaussian-compat", weights[0], "--bilateral-sxy", 9),
        *("--bilateral-srgb", 21, "--bilateral-compat", weights[1], "--iterations", 3),
        *("--gt-prob", 0.6, "--normalization", normalization),
    )
    labels = np.array([1, 2, 0])[np.searchsorted([0, 1, 255], rough_labels())]
    shape = labels.shape
    field = dcrf.DenseCRF(labels.size, 2)
    field.setUnaryEnergy(utils.unary_from_labels(labels, 2, 0.6, zero_unsure=True))
    kind = {"symmetric": dcrf.NORMALIZE_SYMMETRIC, "before": dcrf.NORMALIZE_BEFORE}
    kind |= {"after": dcrf.NORMALIZE_AFTER, "none": dcrf.NO_NORMALIZATION}
    how = {"normalization": kind[normalization]}
    field.addPairwiseEnergy(utils.create_pairwise_gaussian((2, 2), shape), weights[0], **how)
    bilateral = utils.create_pairwise_bilateral((9, 9), (21, 21, 21), scene(), chdim=2)
    field.addPairwiseEnergy(bilateral, weights[1], **how)
    expected = np.asarray(field.inference(3)).reshape(2, *shape)
    np.testing.assert_array_equal(np.load(marginals), expected)
    np.testing.assert_array_equal(load(output), expected.argmax(axis=0))


def test_result_is_the_disc(files: tuple[Path, Path, Path]) -> None:
    image, annotation, output = files
    run_ok("refine", image, annotation, "-o", output)
    truth = scene()[..., 0] > 120
    assert (rough_labels() == 255).mean() > 0.4  # most of it had to be found
    assert (load(output) != truth).sum() <= 2


def test_without_kernels_labels_stay(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    image, _, output = files
    labels = np.random.default_rng(1).integers(0, 5, (24, 32)).astype(np.uint8)
    annotation = save(tmp_path / "all.png", labels)
    run_ok(
        *("refine", image, annotation, "-o", output),
        *("--gaussian-compat", 0, "--bilateral-compat", 0),
    )
    np.testing.assert_array_equal(load(output), labels)


def test_threads_do_not_change_the_result(files: tuple[Path, Path, Path]) -> None:
    import pydense

    image, annotation, output = files
    before = pydense.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        marginals = output.with_name(f"q{threads}.npy")
        run_ok(
            *("refine", image, annotation, "-o", output, "--probabilities", marginals),
            *("--threads", threads),
        )
        results.append(np.load(marginals))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    assert pydense.get_num_threads() == before


def test_messages_and_quiet(files: tuple[Path, Path, Path]) -> None:
    image, annotation, output = files
    out = run_ok("refine", image, annotation, "-o", output).out
    assert "annotation: grey indices, 2 labels, " in out
    assert "image: 32x24, refined in " in out
    assert f"wrote {output}\n" in out
    assert run_ok("refine", image, annotation, "-o", output, "--quiet").out == ""


def test_overlay_blends(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    image, annotation, output = files
    for opacity in (0, 0.25, 0.5, 1):
        overlay = tmp_path / f"overlay{opacity}.png"
        run_ok(
            *("refine", image, annotation, "-o", output, "--overlay", overlay),
            *("--overlay-opacity", opacity),
        )
        expected = (1 - opacity) * scene() + opacity * voc_colors(load(output))
        assert np.abs(load(overlay) - expected).max() <= 0.5
    for suffix, kind in ((".jpg", "JPEG"), (".webp", "WEBP")):
        overlay = tmp_path / f"overlay{suffix}"
        run_ok("refine", image, annotation, "-o", output, "--overlay", overlay)
        with Image.open(overlay) as picture:
            assert (picture.format, picture.size) == (kind, (32, 24))


def test_labels_as_picture_and_array(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    image, annotation, output = files
    for name in ("labels.PNG", "labels.npy"):
        run_ok("refine", image, annotation, "-o", output, "--labels", tmp_path / name)
    np.testing.assert_array_equal(load(tmp_path / "labels.PNG"), load(output))
    array = np.load(tmp_path / "labels.npy")
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array, load(output))


def test_probabilities_can_be_refined_again(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The .npz that is written is an annotation too, and keeps the numbers of the labels."""
    image, _, output = files
    annotation = save(tmp_path / "sparse.png", np.where(rough_labels() == 1, 17, rough_labels()))
    first, second = tmp_path / "first.npz", tmp_path / "second.npz"
    run_ok("refine", image, annotation, "-o", output, "--probabilities", first)
    with np.load(first) as archive:
        assert archive["labels"].tolist() == [0, 17]
        assert archive["probabilities"].shape == (2, 24, 32)
        np.testing.assert_allclose(archive["probabilities"].sum(axis=0), 1, atol=1e-5)
    again = output.with_name("again.png")
    run_ok("refine", image, first, "-o", again, "--probabilities", second)
    assert set(np.unique(load(again))) == {0, 17}
    with np.load(first) as one, np.load(second) as two:
        assert (two["probabilities"].max(axis=0) >= one["probabilities"].max(axis=0)).mean() > 0.9


def test_voc_colors() -> None:
    """The published Pascal VOC colours (background .. tv monitor, void)."""
    published = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128)}
    published |= {7: (128, 128, 128), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    published |= {255: (224, 224, 192)}
    for label, color in published.items():
        assert tuple(voc_colors(np.array(label))) == color
    assert len(np.unique(voc_colors(np.arange(256)), axis=0)) == 256
    assert voc_colors(np.array([[1, 2, 3]])).shape == (1, 3, 3)


def test_draw_borders() -> None:
    labels = np.array([[0, 0, 1], [0, 0, 1], [2, 2, 2]])
    painted = draw_borders(np.zeros((3, 3, 3), np.uint8), labels, (1, 2, 3))
    assert painted.any(axis=2).tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 1]]


def jpeg_cmyk(rgb: np.ndarray) -> Image.Image:
    """A CMYK picture that a JPEG keeps exactly: it comes from one."""
    stream = io.BytesIO()
    Image.fromarray(rgb).convert("CMYK").save(stream, format="JPEG")
    picture = Image.open(stream)
    picture.load()
    assert picture.mode == "CMYK"
    return picture


def photo_kinds() -> dict[str, tuple[Image.Image, dict[str, Any], np.ndarray]]:
    """Photos in every mode: the picture, options to save it, and the RGB it should read as."""
    rgb = scene()
    grey = rgb[..., 0]
    alpha = np.where(np.arange(32) < 16, 0, 255)[None].repeat(24, 0).astype(np.uint8)
    over_white = np.where(alpha[..., None] == 0, 255, rgb).astype(np.uint8)
    grey3 = np.stack([grey] * 3, axis=2)
    half = Image.fromarray(np.where(grey > 120, 255, 0).astype(np.uint8))
    indexed = Image.fromarray(rgb).quantize(16)
    clear = indexed.copy()
    clear_rgb = np.where(
        (np.asarray(clear) == 3)[..., None], 255, np.asarray(indexed.convert("RGB"))
    )
    cmyk = jpeg_cmyk(rgb)
    deep = grey.astype(np.uint16) * 256 + 77
    return {
        "grey": (Image.fromarray(grey), {}, grey3),
        "grey-alpha": (
            Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha))),
            {},
            np.where(alpha[..., None] == 0, 255, grey3),
        ),
        "rgba": (Image.fromarray(np.dstack([rgb, alpha])), {}, over_white),
        "palette": (indexed, {}, np.asarray(indexed.convert("RGB"))),
        "palette-alpha": (clear, {"transparency": 3}, clear_rgb),
        "bilevel": (half.convert("1"), {}, np.asarray(half.convert("RGB"))),
        "grey16": (Image.fromarray(deep), {}, grey3),
        "cmyk": (cmyk, {"format": "JPEG", "quality": "keep"}, np.asarray(cmyk.convert("RGB"))),
        "bmp": (Image.fromarray(rgb), {"format": "BMP"}, rgb),
        "ppm": (Image.fromarray(rgb), {"format": "PPM"}, rgb),
        "webp": (Image.fromarray(rgb), {"format": "WEBP", "lossless": True}, rgb),
        "gif": (indexed, {"format": "GIF"}, np.asarray(indexed.convert("RGB"))),
    }


@pytest.mark.parametrize("kind", photo_kinds())
def test_photos_of_every_kind(files: tuple[Path, Path, Path], tmp_path: Path, kind: str) -> None:
    _, annotation, output = files
    picture, options, expected = photo_kinds()[kind]
    photo = tmp_path / "photo.bin"  # the content decides, not the name
    picture.save(photo, **{"format": "PNG", **options})
    np.testing.assert_array_equal(read_image(photo, max_pixels=10_000), expected)
    run_ok("refine", photo, annotation, "-o", output)
    assert load(output).shape == (24, 32)


def test_sixteen_bit_colours_keep_their_upper_bits(tmp_path: Path) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = (scene(5, 7).astype(np.uint16) * 256 + 129).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)
    (tmp_path / "deep.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png", max_pixels=100), scene(5, 7))


def test_floating_point_photo_is_refused(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, annotation, output = files
    photo = tmp_path / "float.pfm"
    Image.fromarray(scene()[..., 0].astype(np.float32)).save(photo, format="PPM")
    assert "floating-point pictures" in run_error("refine", photo, annotation, "-o", output)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = save(tmp_path / f"photo{suffix}", scene(), exif=exif)
    with Image.open(photo) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture))
        stored = np.asarray(picture)
    np.testing.assert_array_equal(read_image(photo, max_pixels=10_000), expected)
    np.testing.assert_array_equal(read_image(photo, max_pixels=10_000, orient=False), stored)

    turned = orientation >= 5
    upright = save(tmp_path / "upright.png", rough_labels(*expected.shape[:2]))
    lying = save(tmp_path / "lying.png", rough_labels())
    output = tmp_path / "out.png"
    run_ok("refine", photo, upright, "-o", output)
    assert load(output).shape == expected.shape[:2]
    run_ok("refine", photo, lying, "-o", output, "--ignore-orientation")
    assert load(output).shape == (24, 32)
    if turned:
        message = run_error("refine", photo, lying, "-o", output)
        assert message == f"{lying} is 32x24, but the image is 24x32"


def test_one_label_fills_the_picture(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    image, _, output = files
    palette = voc_colors(np.arange(256))
    annotation = save_palette(
        tmp_path / "one.png", np.where(rough_labels() == 1, 9, 255).astype(np.uint8), palette
    )
    run_ok("refine", image, annotation, "-o", output)
    assert (load(output) == 9).all()


def test_tiny_pictures(tmp_path: Path) -> None:
    for shape in ((1, 1), (1, 9), (9, 1), (2, 2)):
        photo = save(tmp_path / "photo.png", scene(*shape))
        labels = np.arange(shape[0] * shape[1], dtype=np.uint8).reshape(shape) % 3
        annotation = save(tmp_path / "labels.png", labels)
        run_ok("refine", photo, annotation, "-o", tmp_path / "out.png")
        assert load(tmp_path / "out.png").shape == shape


def test_parameters_beyond_the_lattice_are_an_error(files: tuple[Path, Path, Path]) -> None:
    image, annotation, output = files
    message = run_error("refine", image, annotation, "-o", output, "--bilateral-srgb", 1e-30)
    assert "features" in message
    assert not output.exists()
