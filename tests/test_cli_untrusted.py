# SPDX-License-Identifier: Apache-2.0
"""`pydense refine` on broken and hostile files: success or one clear line, nothing else."""

from __future__ import annotations

import errno
import io
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from _cli import load, rough_labels, run, run_error, run_ok, save, scene
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib import format as npy
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
SMALL = (12, 16)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, depth: int = 8, color: int = 2, data: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(data))
    return SIGNATURE + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def encoded(array: np.ndarray, kind: str, mode: str | None = None) -> bytes:
    stream = io.BytesIO()
    picture = Image.fromarray(array)
    exif = Image.Exif()
    exif[0x0112] = 3
    (picture if mode is None else picture.convert(mode)).save(stream, format=kind, exif=exif)
    return stream.getvalue()


def archived(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, probabilities=array, labels=np.arange(2))
    return stream.getvalue()


def stored(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


PHOTO = scene(*SMALL)
LABELS = rough_labels(*SMALL)
COLORS = np.where((LABELS == 255)[..., None], 0, 40 + 90 * (LABELS[..., None] % 2)).repeat(3, 2)
SOFT = np.stack([np.where(LABELS == 1, 0.8, 0.3), np.where(LABELS == 1, 0.2, 0.7)])

# The file to break, its name, and whether it is the photo (0) or the annotation (1).
VICTIMS: dict[str, tuple[bytes, str, int]] = {
    "photo png": (encoded(PHOTO, "PNG"), "image.png", 0),
    "photo palette png": (encoded(PHOTO, "PNG", "P"), "image.png", 0),
    "photo jpeg": (encoded(PHOTO, "JPEG"), "image.jpg", 0),
    "photo webp": (encoded(PHOTO, "WEBP"), "image.webp", 0),
    "photo bmp": (encoded(PHOTO, "BMP"), "image.bmp", 0),
    "photo gif": (encoded(PHOTO, "GIF", "P"), "image.gif", 0),
    "photo ppm": (encoded(PHOTO, "PPM"), "image.ppm", 0),
    "annotation colours": (encoded(COLORS.astype(np.uint8), "PNG"), "labels.png", 1),
    "annotation palette": (encoded(LABELS, "PNG", "P"), "labels.png", 1),
    "annotation npy": (stored(SOFT.astype(np.float32)), "labels.npy", 1),
    "annotation npz": (archived(SOFT.astype(np.float16)), "labels.npz", 1),
}
EXAMPLES = {"photo png": 400, "photo jpeg": 400, "annotation colours": 300}


@st.composite
def broken(draw: st.DrawFn, original: bytes) -> bytes:
    """Bytes of a file after some damage: changed, lost, repeated or foreign bytes."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["set", "set", "set", "cut", "drop", "repeat", "insert"])):
            case "set" if data:
                data[place] = draw(st.integers(0, 255))
            case "cut":
                del data[place:]
            case "drop":
                del data[place : place + draw(st.integers(1, 8))]
            case "repeat":
                data[place:place] = data[place : place + draw(st.integers(1, 64))]
            case "insert":
                data[place:place] = draw(st.binary(max_size=8))
    return bytes(data)


@st.composite
def broken_png(draw: st.DrawFn, original: bytes) -> bytes:
    """A PNG damaged inside its chunks, with right checksums: the damage gets to the decoder."""
    chunks = []
    position = len(SIGNATURE)
    while position < len(original):
        (size,) = struct.unpack_from(">I", original, position)
        kind = original[position + 4 : position + 8]
        chunks.append((kind, original[position + 8 : position + 8 + size]))
        position += 12 + size
    victim = draw(st.integers(0, len(chunks) - 1))
    if draw(st.booleans()) and chunks[victim][1]:
        chunks[victim] = (chunks[victim][0], draw(broken(chunks[victim][1])))
    else:
        extra = draw(
            st.sampled_from([b"tRNS", b"PLTE", b"eXIf", b"iCCP", b"tEXt", b"zTXt", b"sBIT"])
        )
        chunks.insert(max(victim, 1), (extra, draw(st.binary(max_size=40))))
    if draw(st.booleans()):
        kind, data = chunks[0]
        if len(data) == 13:
            fields = draw(st.binary(min_size=5, max_size=5))
            chunks[0] = (kind, data[:8] + fields)
    return SIGNATURE + b"".join(chunk(kind, data) for kind, data in chunks)


def check_clean(folder: Path, name: str, data: bytes, place: int) -> None:
    """Refine with one damaged file: success with a whole output, or one line and no output."""
    output = folder / "out.png"
    output.unlink(missing_ok=True)
    files = [folder / "good.png", folder / "good-labels.png"]
    files[place] = folder / name
    files[place].write_bytes(data)
    before = set(os.listdir(folder))
    result = run("refine", *files, "-o", output)
    after = set(os.listdir(folder))
    if result.code == 0:
        assert result.err == ""
        assert after - before == {"out.png"}
        with Image.open(output) as picture:
            picture.load()
    else:
        assert result.code == 1, result
        assert result.err.startswith("pydense: error: "), result
        assert result.err.count("\n") == 1, result
        assert result.err.isprintable() or result.err[:-1].isprintable(), result
        assert "internal error" not in result.err, result
        assert result.out == ""
        assert after == before


@pytest.mark.parametrize("victim", VICTIMS)
def test_damaged_files(tmp_path: Path, victim: str) -> None:
    original, name, place = VICTIMS[victim]
    save(tmp_path / "good.png", PHOTO)
    save(tmp_path / "good-labels.png", LABELS)
    check_clean(tmp_path, name, original, place)
    assert (tmp_path / "out.png").exists()  # undamaged it works
    codes = set()
    damage = broken(original)
    if name.endswith(".png"):
        damage = st.one_of(broken(original), broken_png(original))

    @settings(max_examples=EXAMPLES.get(victim, 150))
    @given(damage)
    def damaged(data: bytes) -> None:
        check_clean(tmp_path, name, data, place)
        codes.add((tmp_path / "out.png").exists())

    damaged()
    assert codes == {False, True}  # the damage was neither always fatal nor always harmless


def test_every_truncation_of_a_png(tmp_path: Path) -> None:
    """Without its end a file is refused, or nothing of the picture was in the part that is lost."""
    path = save(tmp_path / "image.png", PHOTO)
    save(tmp_path / "good.png", PHOTO)
    labels = save(tmp_path / "good-labels.png", LABELS)
    output = tmp_path / "out.png"
    original = path.read_bytes()
    run_ok("refine", path, labels, "-o", output)
    expected = load(output)
    complete = []
    for size in range(len(original)):
        check_clean(tmp_path, "image.png", original[:size], 0)
        if output.exists():
            complete.append(size)
            np.testing.assert_array_equal(load(output), expected)
    assert len(complete) < 30  # checksums and the end mark


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    image = save(tmp_path / "image.png", PHOTO)
    return image, save(tmp_path / "labels.png", LABELS), tmp_path / "out.png"


def test_too_many_pixels(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Judged by the header: nothing is decoded, no memory is taken."""
    image, annotation, output = files
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png(9000, 9000))
    expected = f"{bomb} has 9000x9000 pixels, more than the limit of 64000000"
    assert run_error("refine", bomb, annotation, "-o", output).startswith(expected)
    assert run_error("refine", image, bomb, "-o", output).startswith(expected)
    message = run_error("refine", image, annotation, "-o", output, "--max-pixels", 191)
    assert "has 16x12 pixels, more than the limit of 191" in message
    run_ok("refine", image, annotation, "-o", output, "--max-pixels", 192)
    for side in (10_000, 30_000, 2**31 - 1):  # where Pillow warns, refuses, overflows
        bomb.write_bytes(png(side, side))
        message = run_error("refine", bomb, annotation, "-o", output, "--max-pixels", 10**19)
        assert "Pillow's safety limit" in message


def test_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    """The same in a process whose memory is limited: refused by size, not by exhaustion."""
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png(60_000, 60_000))
    program = (
        "import resource, sys; limit = 2 << 30;"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit));"
        "from pydense.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "refine", bomb, bomb, "-o", tmp_path / "out.png"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"pydense: error: {bomb} ")
    assert "limit" in done.stderr


def test_things_that_are_no_picture(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    image, annotation, output = files
    pipe, folder = tmp_path / "pipe.png", tmp_path / "folder.png"
    os.mkfifo(pipe)
    folder.mkdir()
    contents = {
        "empty.png": b"",
        "text.png": b"hello",
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "tagged.png": encoded(PHOTO, "TIFF"),
        "vector.png": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    }
    cases = {pipe: "not a regular file", folder: "not a regular file"}
    cases[tmp_path / "missing.png"] = "No such file or directory"
    cases[tmp_path / "nul\0.png"] = ""
    cases[tmp_path / ("x" * 300)] = "File name too long"
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        cases[tmp_path / name] = "is not a picture that can be read (PNG, JPEG, "
    for path, message in cases.items():
        assert message in run_error("refine", path, annotation, "-o", output), path
        assert message in run_error("refine", image, path, "-o", output), path
    for suffix in (".npy", ".npz"):
        for name in ("empty", "text", "postscript"):
            path = tmp_path / f"{name}{suffix}"
            path.write_bytes(contents[f"{name}.png"])
            assert "broken array file" in run_error("refine", image, path, "-o", output)
        missing = tmp_path / f"missing{suffix}"
        assert "No such file" in run_error("refine", image, missing, "-o", output)
    assert not output.exists()


def test_unreadable_file(files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated, as these tests may be run by root, whom no permission stops."""
    image, annotation, output = files
    open_file = Path.open

    def refuse(self: Path, *arguments: str) -> object:
        if self == image:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return open_file(self, *arguments)

    monkeypatch.setattr(Path, "open", refuse)
    message = run_error("refine", image, annotation, "-o", output)
    assert message == f"cannot read {image}: Permission denied"


def header(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    stream = io.BytesIO()
    npy.write_array_header_2_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


@pytest.mark.parametrize(
    "wrap", [lambda data: data, lambda data: zipped({"x.npy": data})], ids=["npy", "npz"]
)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header((10**12, *SMALL)), "has 1000000000000 labels"),
        (header((60000, *SMALL)) + b"\0" * 64, "shorter than its shape says"),
        (header((2, *SMALL)), "shorter than its shape says"),
        (header((2, *SMALL)) + b"\0" * (2 * 12 * 16 * 4 - 1), "shorter than its shape says"),
        (header((-2, *SMALL)), "negative shape"),
        (header(SMALL, "|O") + b"cos\nsystem\n(S'false'\ntR.", "never read"),
        (b"\x93NUMPY\x03\x00" + header((2, *SMALL))[8:], "unsupported .npy version 3.0"),
        (b"\x93NUMPY\x01\x00\xff\xff{'descr'", "broken array file"),
        (header((2, *SMALL)).replace(b"'descr'", b"'desc?'"), "broken array file"),
    ],
)
def test_lying_array_headers(
    files: tuple[Path, Path, Path], data: bytes, message: str, wrap: Callable[[bytes], bytes]
) -> None:
    image, annotation, output = files
    wrapped = wrap(data)
    path = annotation.with_suffix(".npy" if wrapped == data else ".npz")
    path.write_bytes(wrapped)
    assert message in run_error("refine", image, path, "-o", output)


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def test_archive_that_lies_about_its_size(files: tuple[Path, Path, Path]) -> None:
    """The directory of the .npz promises more bytes than there are."""
    image, annotation, output = files
    good = header((2, *SMALL)) + SOFT.astype("<f4").tobytes()
    real, claimed = struct.pack("<I", len(good) - 700), struct.pack("<I", len(good))
    data = zipped({"x.npy": good[:-700]}, zipfile.ZIP_STORED)
    assert data.count(real) == 4  # stored and full size, in the entry and in the directory
    path = annotation.with_suffix(".npz")
    path.write_bytes(data.replace(real, claimed))
    message = run_error("refine", image, path, "-o", output)
    assert "broken array file" in message


def test_names_cannot_drive_the_terminal(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    image, annotation, output = files
    evil = tmp_path / "evil\x1b[31m\n.png"
    evil.write_bytes(b"no picture")
    message = run_error("refine", evil, annotation, "-o", output)
    assert r"evil\x1b[31m\n.png is not a picture" in message
    undecodable = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    image.rename(undecodable)
    run_ok("refine", undecodable, annotation, "-o", output)
    assert load(output).shape == SMALL
    message = run_error("refine", undecodable, tmp_path / "missing.png", "-o", output)
    assert "missing.png" in message


def test_grey_png_with_transparent_colour(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A tRNS chunk in an index picture is not a label matter."""
    image, _, output = files
    data = encoded(LABELS, "PNG")
    place = data.index(b"IDAT") - 4
    path = tmp_path / "a.png"
    path.write_bytes(data[:place] + chunk(b"tRNS", b"\x00\x01") + data[place:])
    run_ok("refine", image, path, "-o", output)
    assert set(np.unique(load(output))) == {0, 1}
