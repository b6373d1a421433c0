# SPDX-License-Identifier: Apache-2.0
"""`pydense refine`: how annotations are read, and that results come back in their style."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _cli import load, rough_labels, run_error, run_ok, save, save_palette, scene
from PIL import Image

from pydense.cli._palette import voc_colors

# Without kernels the result is the annotation itself wherever that is known, so that these tests
# see nothing but reading and writing.
PLAIN = ("--gaussian-compat", 0, "--bilateral-compat", 0)
VOC = voc_colors(np.arange(256))
ROUGH = rough_labels()
KNOWN = ROUGH != 255


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return save(tmp_path / "image.png", scene())


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.png"


def random_labels(count: int) -> np.ndarray:
    labels = np.random.default_rng(3).integers(0, count, (24, 32))
    labels.flat[:count] = np.arange(count)
    return labels


def test_colours_come_back_as_colours(image: Path, output: Path, tmp_path: Path) -> None:
    colors = np.array([[255, 0, 0], [10, 200, 30], [0, 0, 1]], np.uint8)
    labels = random_labels(3)
    drawn = colors[labels]
    drawn[~KNOWN] = 0
    indices = tmp_path / "indices.png"
    result = run_ok(
        "refine", image, save(tmp_path / "a.png", drawn), "-o", output, "--labels", indices, *PLAIN
    )
    assert "annotation: colours, 3 labels, " in result.out
    with Image.open(output) as picture:
        assert picture.mode == "RGB"
    np.testing.assert_array_equal(load(output)[KNOWN], drawn[KNOWN])
    assert not (load(output) == 0).all(axis=2).any()  # nothing stays unknown
    # As indices the labels count from 0, ordered by blue, green, red, in the same colours.
    assert set(np.unique(load(indices))) == {0, 1, 2}
    with Image.open(indices) as picture:
        assert picture.mode == "P"
    np.testing.assert_array_equal(load(indices, "RGB"), load(output))
    assert (load(indices)[KNOWN] == np.array([0, 2, 1])[labels[KNOWN]]).all()


def test_another_unknown_colour(image: Path, output: Path, tmp_path: Path) -> None:
    drawn = np.where(KNOWN[..., None], VOC[ROUGH], (255, 0, 255)).astype(np.uint8)
    annotation = save(tmp_path / "a.png", drawn)
    run_ok("refine", image, annotation, "-o", output, "--unknown", "#ff00ff")
    colors = {tuple(color) for color in load(output).reshape(-1, 3).tolist()}
    assert colors == {(0, 0, 0), (128, 0, 0)}  # black is a label now
    message = run_error("refine", image, annotation, "-o", output, "--unknown", 3, code=2)
    assert message.startswith("--unknown must be a colour")


@pytest.mark.parametrize("option", [("--unknown", "none"), ("--no-zero-unsure",)])
def test_nothing_unknown(image: Path, output: Path, tmp_path: Path, option: tuple[str]) -> None:
    drawn = VOC[np.where(KNOWN, ROUGH, 0)]  # two colours, black and dark red
    result = run_ok("refine", image, save(tmp_path / "a.png", drawn), "-o", output, *option, *PLAIN)
    assert "2 labels, none unknown" in result.out
    np.testing.assert_array_equal(load(output), drawn)


def test_transparent_is_unknown(image: Path, output: Path, tmp_path: Path) -> None:
    alpha = np.where(KNOWN, 255, 0).astype(np.uint8)
    colors = np.where(ROUGH == 1, 200, 90).astype(np.uint8)
    drawn = np.dstack([colors, colors, colors // 2, alpha])
    drawn[~KNOWN, :3] = np.random.default_rng(0).integers(0, 256, (int((~KNOWN).sum()), 3))
    result = run_ok("refine", image, save(tmp_path / "a.png", drawn), "-o", output)
    assert "colours, 2 labels, " in result.out
    np.testing.assert_array_equal(load(output)[KNOWN], drawn[KNOWN, :3])


@pytest.mark.parametrize("size", [256, 40, 16, 4])
@pytest.mark.parametrize("transparency", [None, 0, b"\x00\xff"])
def test_palette_round_trip(
    image: Path, output: Path, tmp_path: Path, size: int, transparency: Any
) -> None:
    palette = np.random.default_rng(size).integers(1, 256, (size, 3)).astype(np.uint8)
    labels = random_labels(4).astype(np.uint8)
    if size == 256:
        labels[~KNOWN] = 255
    options = {} if transparency is None else {"transparency": transparency}
    annotation = save_palette(tmp_path / "a.png", labels, palette, **options)
    run_ok("refine", image, annotation, "-o", output, *PLAIN)
    with Image.open(output) as new, Image.open(annotation) as old:
        assert new.mode == "P"
        assert new.getpalette() == old.getpalette()
        assert new.info.get("transparency") == old.info.get("transparency")
    known = KNOWN if size == 256 else np.ones_like(KNOWN)
    np.testing.assert_array_equal(load(output)[known], labels[known])
    assert set(np.unique(load(output))) == {0, 1, 2, 3}


def test_palette_without_an_entry_for_void(image: Path, output: Path, tmp_path: Path) -> None:
    """Some writers keep 21 colours and still use 255; such files are read and filled."""
    labels = np.where(KNOWN, ROUGH, 255).astype(np.uint8)
    annotation = tmp_path / "a.png"
    save_palette(annotation, labels, VOC)
    data = annotation.read_bytes()
    start = data.index(b"PLTE")
    short = b"PLTE" + data[start + 4 : start + 4 + 63]
    end = start + 4 + 768 + 4
    annotation.write_bytes(
        data[: start - 4]
        + struct.pack(">I", 63)
        + short
        + struct.pack(">I", zlib.crc32(short))
        + data[end:]
    )
    run_ok("refine", image, annotation, "-o", output)
    assert set(np.unique(load(output))) == {0, 1}
    with Image.open(output) as picture:
        assert picture.getpalette() == VOC[:21].ravel().tolist()
    run_ok("refine", image, annotation, "-o", output, "--unknown", "none", *PLAIN)
    np.testing.assert_array_equal(load(output), labels)  # 255 is a label, its colour VOC's
    np.testing.assert_array_equal(load(output, "RGB"), VOC[labels])


def test_black_inside_a_palette_means_colours(image: Path, output: Path, tmp_path: Path) -> None:
    """A colour picture that an optimiser stored with a palette: black is unknown."""
    palette = np.array([[64, 128, 0], [0, 0, 0], [0, 64, 0]])
    labels = np.array([0, 2, 1], np.uint8)[np.searchsorted([0, 1, 255], ROUGH)]
    annotation = save_palette(tmp_path / "a.png", labels, palette)
    assert "colours, 2 labels, " in run_ok("refine", image, annotation, "-o", output).out
    np.testing.assert_array_equal(load(output)[KNOWN], palette[labels[KNOWN]])
    run_ok("refine", image, annotation, "-o", output, "--annotation-format", "indices", *PLAIN)
    np.testing.assert_array_equal(load(output), labels)
    run_ok("refine", image, annotation, "-o", output, "--unknown", 2, *PLAIN)
    assert set(np.unique(load(output))) == {0, 1}
    # Black at 0 is the background of label palettes; --annotation-format tells otherwise.
    palette[[0, 1]] = palette[[1, 0]]
    annotation = save_palette(tmp_path / "a.png", labels, palette)
    assert "palette indices, 3 " in run_ok("refine", image, annotation, "-o", output).out
    for option in (("--annotation-format", "colors"), ("--unknown", "#000000")):
        out = run_ok("refine", image, annotation, "-o", output, *option).out
        assert "colours, 2 labels" in out


def test_grey_indices_get_voc_colours(image: Path, output: Path, tmp_path: Path) -> None:
    labels = np.array([0, 7, 15, 200], np.uint8)[random_labels(4)]
    labels[~KNOWN] = 255
    result = run_ok("refine", image, save(tmp_path / "a.png", labels), "-o", output, *PLAIN)
    assert "grey indices, 4 labels, " in result.out
    with Image.open(output) as picture:
        assert picture.mode == "P"
        assert picture.getpalette() == VOC.ravel().tolist()
    np.testing.assert_array_equal(load(output)[KNOWN], labels[KNOWN])


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_grey_of_few_bits_is_not_stretched(
    image: Path, output: Path, tmp_path: Path, depth: int
) -> None:
    labels = random_labels(min(1 << depth, 6)).astype(np.uint8)
    bits = np.unpackbits(labels[..., None], axis=2)[..., 8 - depth :].reshape(24, -1)
    raw = b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    annotation = tmp_path / "a.png"
    annotation.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 24, depth, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )
    run_ok("refine", image, annotation, "-o", output, *PLAIN)
    np.testing.assert_array_equal(load(output), labels)


def test_labels_above_255(image: Path, output: Path, tmp_path: Path) -> None:
    labels = np.array([3, 255, 256, 60000], np.uint16)[random_labels(4)]
    labels[~KNOWN] = 65535
    array = tmp_path / "labels.npy"
    annotation = save(tmp_path / "a.png", labels)
    run_ok("refine", image, annotation, "-o", output, "--labels", array, *PLAIN)
    with Image.open(output) as picture:
        assert picture.mode.startswith("I;16")
    np.testing.assert_array_equal(load(output)[KNOWN], labels[KNOWN])
    assert np.load(array).dtype == np.uint16
    np.testing.assert_array_equal(np.load(array), load(output))


def test_black_and_white_mask(image: Path, output: Path, tmp_path: Path) -> None:
    """0/255 masks: 255 would count as unknown and one label would be left; say so."""
    mask = np.where(ROUGH == 1, 255, 0).astype(np.uint8)
    annotation = save(tmp_path / "a.png", mask)
    message = run_error("refine", image, annotation, "-o", output)
    assert "--unknown none" in message
    assert not output.exists()
    run_ok("refine", image, annotation, "-o", output, "--unknown", "none", *PLAIN)
    np.testing.assert_array_equal(load(output), mask)
    Image.fromarray(mask).convert("1").save(annotation)
    run_ok("refine", image, annotation, "-o", output, *PLAIN)
    np.testing.assert_array_equal(load(output), mask // 255)


def test_grey_saved_as_rgb(image: Path, output: Path, tmp_path: Path) -> None:
    labels = random_labels(3).astype(np.uint8)
    annotation = save(tmp_path / "a.png", np.stack([labels] * 3, axis=2))
    run_ok("refine", image, annotation, "-o", output, "--annotation-format", "indices", *PLAIN)
    np.testing.assert_array_equal(load(output), labels)
    annotation = save(tmp_path / "a.png", VOC[labels])
    message = run_error("refine", image, annotation, "-o", output, "--annotation-format", "indices")
    assert "channels differ" in message


def test_grey_read_as_colours(image: Path, output: Path, tmp_path: Path) -> None:
    labels = np.array([0, 100, 200], np.uint8)[random_labels(3)]
    annotation = save(tmp_path / "a.png", labels)
    form = ("--annotation-format", "colors")
    out = run_ok("refine", image, annotation, "-o", output, *form, *PLAIN).out
    assert "colours, 2 labels" in out
    assert set(np.unique(load(output))) == {100, 200}


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint64, ">i4", np.bool_])
def test_integer_arrays_are_labels(image: Path, output: Path, tmp_path: Path, dtype: Any) -> None:
    labels = ROUGH.astype(np.int64)
    if np.dtype(dtype) == np.bool_:
        labels = np.where(ROUGH == 1, 1, 0)
    elif np.dtype(dtype).kind == "i":
        labels[2] = -1
    known = (labels >= 0) & (labels != 255)
    for order in ("C", "F"):
        np.save(tmp_path / "a.npy", np.asarray(labels.astype(dtype), order=order))
        run_ok("refine", image, tmp_path / "a.npy", "-o", output, *PLAIN)
        np.testing.assert_array_equal(load(output)[known], labels[known])
        assert set(np.unique(load(output))) == {0, 1}


def test_array_label_too_large(image: Path, output: Path, tmp_path: Path) -> None:
    labels = random_labels(3)
    labels[0, 0] = 2**40
    np.save(tmp_path / "a.npy", labels)
    message = run_error("refine", image, tmp_path / "a.npy", "-o", output)
    assert "has label 1099511627776" in message


def probabilities(count: int = 3) -> np.ndarray:
    values = np.random.default_rng(5).random((count, 24, 32))
    return values / values.sum(axis=0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_probabilities_in_both_layouts(
    image: Path, output: Path, tmp_path: Path, dtype: Any
) -> None:
    values = probabilities().astype(dtype)
    results = []
    for number, array in enumerate([values, values.transpose(1, 2, 0), np.asfortranarray(values)]):
        np.save(tmp_path / "a.npy", array)
        marginals = tmp_path / f"q{number}.npy"
        run_ok("refine", image, tmp_path / "a.npy", "-o", output, "--probabilities", marginals)
        results.append(np.load(marginals))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    run_ok("refine", image, tmp_path / "a.npy", "-o", output, "--probabilities", marginals, *PLAIN)
    np.testing.assert_allclose(
        np.load(marginals), values, atol=2e-3 if dtype == np.float16 else 1e-5
    )
    np.testing.assert_array_equal(load(output), np.load(marginals).argmax(axis=0))


def test_archives_and_keys(image: Path, output: Path, tmp_path: Path) -> None:
    archive = tmp_path / "a.npz"
    np.savez_compressed(archive, scores=probabilities())
    run_ok("refine", image, archive, "-o", output)
    np.savez(archive, first=np.eye(3), scores=probabilities())
    message = run_error("refine", image, archive, "-o", output)
    assert "name one with --key (first, scores)" in message
    run_ok("refine", image, archive, "-o", output, "--key", "scores")
    message = run_error("refine", image, archive, "-o", output, "--key", "second")
    assert "has no array second (first, scores)" in message
    np.savez(archive)
    assert "several arrays or none" in run_error("refine", image, archive, "-o", output)
    np.save(tmp_path / "a.npy", probabilities())
    message = run_error("refine", image, tmp_path / "a.npy", "-o", output, "--key", "scores")
    assert "--key is for .npz files" in message


def test_numbers_beside_probabilities(image: Path, output: Path, tmp_path: Path) -> None:
    archive = tmp_path / "a.npz"
    np.savez(archive, probabilities=probabilities(), labels=np.array([4, 300, 9]))
    run_ok("refine", image, archive, "-o", output, *PLAIN)
    assert set(np.unique(load(output))) == {4, 9, 300}
    for labels in (np.array([4, 5]), np.array([1, 2, -3]), np.array([1, 2, 70000]), np.eye(3)):
        np.savez(archive, probabilities=probabilities(), labels=labels)
        assert "the array labels must" in run_error("refine", image, archive, "-o", output)


def bad_arrays() -> dict[str, tuple[np.ndarray, str]]:
    nan, infinite = probabilities(), probabilities()
    nan[1, 2, 3], infinite[0, 0, 0] = np.nan, np.inf
    return {
        "logits": (probabilities() * 9 - 4, "logits need a softmax"),
        "too large": (probabilities() * 1e300, "must be finite"),
        "nan": (nan, "must be finite"),
        "infinite": (infinite, "must be finite"),
        "other size": (probabilities()[:, 1:], "must hold floating-point probabilities of shape"),
        "one map": (probabilities()[0], "must hold floating-point probabilities of shape"),
        "four axes": (probabilities()[None], "must hold floating-point probabilities of shape"),
        "no labels": (probabilities()[:0], "has 0 labels"),
        "counts": ((probabilities() * 100).astype(np.int64), "must hold floating-point"),
        "complex": (probabilities().astype(complex), "must hold floating-point"),
        "text": (np.full((24, 32), "sky"), "must hold floating-point"),
        "objects": (np.full((24, 32), None), "object arrays (pickles) are never read"),
        "records": (np.zeros((24, 32), [("a", "i4")]), "must hold floating-point"),
    }


@pytest.mark.parametrize("kind", bad_arrays())
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_unusable_arrays(image: Path, output: Path, tmp_path: Path, kind: str, suffix: str) -> None:
    array, message = bad_arrays()[kind]
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, array, allow_pickle=True)
    else:
        np.savez(path, array)
    error = run_error("refine", image, path, "-o", output)
    assert message in error
    assert str(path) in error
    assert not output.exists()


def test_unknown_does_not_go_with_probabilities(image: Path, output: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", probabilities())
    run_error("refine", image, tmp_path / "a.npy", "-o", output, "--unknown", 3, code=2)
    run_ok("refine", image, tmp_path / "a.npy", "-o", output, "--unknown", "none")


def test_unknown_colour_for_indices(image: Path, output: Path, tmp_path: Path) -> None:
    annotation = save(tmp_path / "a.png", ROUGH)
    message = run_error("refine", image, annotation, "-o", output, "--unknown", "#010203", code=2)
    assert "got a colour" in message


def test_photo_as_annotation(tmp_path: Path, output: Path) -> None:
    big = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    photo = save(tmp_path / "photo.png", big)
    message = run_error("refine", photo, photo, "-o", output)
    assert "at most 256 can be labels; is it a photo" in message
    lossy = save(tmp_path / "photo.jpg", big)
    assert "JPEG changes colours" in run_error("refine", photo, lossy, "-o", output)
    deep = save(tmp_path / "deep.png", np.arange(1600, dtype=np.uint16).reshape(40, 40))
    assert "has 1600 labels, at most 256" in run_error("refine", photo, deep, "-o", output)


def test_256_colours_are_enough_and_not_too_many(tmp_path: Path, output: Path) -> None:
    colors = np.random.default_rng(0).integers(1, 256, (257, 3)).astype(np.uint8)
    assert len(np.unique(colors, axis=0)) == 257
    photo = save(tmp_path / "photo.png", scene(1, 257))
    assert "has 257 colours" in run_error(
        "refine", photo, save(tmp_path / "a.png", colors[None]), "-o", output
    )
    colors[256] = 0
    run_ok("refine", photo, save(tmp_path / "a.png", colors[None]), "-o", output, *PLAIN)
    np.testing.assert_array_equal(load(output)[0, :256], colors[:256])


def test_all_unknown(image: Path, output: Path, tmp_path: Path) -> None:
    for array in (np.zeros((24, 32, 3), np.uint8), np.full((24, 32), 255, np.uint8)):
        annotation = save(tmp_path / "a.png", array)
        assert "has no labelled pixel" in run_error("refine", image, annotation, "-o", output)


def test_sizes_must_agree(image: Path, output: Path, tmp_path: Path) -> None:
    annotation = save(tmp_path / "a.png", rough_labels(32, 24))
    message = run_error("refine", image, annotation, "-o", output)
    assert message == f"{annotation} is 24x32, but the image is 32x24"
