# SPDX-License-Identifier: Apache-2.0
"""Reading and writing checkpoint files; nothing in them is ever run."""

from __future__ import annotations

import io
import json
import os
import stat
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from . import _caffe, _mxnet, _safetensors
from ._errors import CheckpointError, printable

SUFFIXES = (".pth", ".pt", ".tar", ".safetensors", ".caffemodel", ".params")
_MAX_BYTES = 16 * 2**30
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "segmenter", "model", "net")
_MXNET = (0x112).to_bytes(8, "little")
_ABOUT = "pydense"
_MAX_NAME = 4096
_MAX_DEPTH, _MAX_BESIDE = 4, 1000


@dataclass(frozen=True)
class About:
    """What a checkpoint of pydense's own says of itself (in the metadata of a safetensors file).

    Attributes:
        model: A name of ``pydense.models.list_models()``.
        options: Of its constructor: numbers, words, flags, and lists of these.
        preprocessing: A name of ``pydense.checkpoints.PREPROCESSING``.
        labels: Name of the label set, as ``pydense predict --labels`` takes it.
        beside: Entries of the file beside the weights (epoch, optimizer), which are not read. Never
            written. Of very many the first 1000, and what is no text by its type, ``<int>``.
    """

    model: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: str = ""
    labels: str = ""
    beside: tuple[str, ...] = ()


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], About]:
    """Everything a checkpoint file holds, on the CPU.

    PyTorch files (``weights_only=True``), safetensors, Caffe's ``.caffemodel`` (keys
    ``layer.blob``) and MXNet's ``.params``. What training scripts wrap around the weights
    (``{"state_dict": ...}``) is taken off; the wrapper's other entries (optimizer, epoch) are no
    weights, and ``beside`` names them.

    Raises:
        CheckpointError: A file that is missing, broken, of another kind, or that wants to run code.
    """
    name = printable(os.fspath(path))
    suffix = Path(path).suffix.lower()
    try:
        with _open(path) as stream:
            start = stream.read(16)
            if _is_torch(suffix, start):
                stream.seek(0)
                weights, beside = unwrap(_read_torch(stream))
                return weights, About(beside=beside)
            return _parse(suffix, memoryview(start + stream.read()))
    except OSError as error:
        raise CheckpointError(f"{name}: {error.strerror or error}") from None
    except ValueError as error:  # ours, or a name with a null byte
        raise CheckpointError(f"{name}: {error}") from None


def _open(path: str | os.PathLike[str]) -> IO[bytes]:
    """A regular file; a pipe without a writer would keep a plain ``open`` waiting for ever."""
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        info = os.fstat(number)
        if not stat.S_ISREG(info.st_mode):
            raise CheckpointError("not a regular file")
        if info.st_size > _MAX_BYTES:
            raise CheckpointError(f"larger than {_MAX_BYTES >> 30} GiB")
    except BaseException:
        os.close(number)
        raise
    return os.fdopen(number, "rb")


def _is_torch(suffix: str, start: bytes) -> bool:
    if suffix in (".safetensors", ".caffemodel", ".params"):
        return False
    return start[:4] == b"PK\x03\x04" or start[:1] == b"\x80" or suffix in (".tar",)


def _parse(suffix: str, data: memoryview) -> tuple[dict[str, Any], About]:
    if suffix == ".caffemodel":
        return dict(_caffe.parse(data)), About()
    if suffix == ".params" or bytes(data[:8]) == _MXNET:
        return dict(_mxnet.parse(data)), About()
    if suffix == ".safetensors" or bytes(data[8:9]) == b"{":
        tensors, texts = _safetensors.parse(data)
        return dict(tensors), _about(texts)
    raise CheckpointError("neither a PyTorch, a safetensors, a Caffe nor an MXNet file")


def _require_stored(stream: IO[bytes]) -> None:
    """An error for archives that unpack to more than the file's own size.

    PyTorch stores tensors as they are; its reader would inflate compressed ones without a limit.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            rows = archive.infolist()
    except Exception as error:  # as below
        text = printable(" ".join(str(error).split()))[:200]
        raise CheckpointError(f"broken PyTorch file: {type(error).__name__}: {text}") from None
    for row in rows:
        if row.compress_type != zipfile.ZIP_STORED or row.file_size != row.compress_size:
            raise CheckpointError(
                f"its part {printable(row.filename[:200])} is compressed, which tensors in a "
                "PyTorch file never are"
            )
    if sum(row.file_size for row in rows) > os.fstat(stream.fileno()).st_size:
        raise CheckpointError("broken PyTorch file: its parts are larger than the file")


def _read_torch(stream: IO[bytes]) -> Any:
    if stream.read(4) == b"PK\x03\x04":
        _require_stored(stream)
    stream.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # broken bytes make the reader raise nearly anything
        text = str(error)
        if "Weights only load failed" in text or "Unsupported operand" in text:
            # What torch says at length, with advice that must not be followed here.
            reason = text.rpartition("WeightsUnpickler error: ")[2].split(". ")[0].split("\n")[0]
            raise CheckpointError(
                "holds more than tensors and plain values, which is never run "
                f"(weights_only=True): {printable(reason[:200])}"
            ) from None
        raise CheckpointError(
            f"broken PyTorch file: {type(error).__name__}: "
            f"{printable(' '.join(text.split())[:200])}"
        ) from None


def unwrap(found: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The mapping that holds the tensors, and the names of what stands beside it."""
    path = _wrappers(found, _MAX_DEPTH, {})
    if path is None:
        raise CheckpointError(f"holds no weights by name, but {type(found).__name__}")
    beside: list[str] = []
    for key in path:
        others = (name for name in found if not (isinstance(name, str) and name == key))
        beside += [_shown(name) for name in islice(others, _MAX_BESIDE - len(beside))]
        found = found[key]
    if not all(isinstance(key, str) and len(key) <= _MAX_NAME for key in found):
        raise CheckpointError(f"holds names that are no texts of up to {_MAX_NAME} characters")
    return dict(found), tuple(beside)


def _wrappers(found: Any, depth: int, failed: dict[int, tuple[Any, int]]) -> tuple[str, ...] | None:
    """The keys that lead to the mapping with tensors in the most wrappers, None without any.

    Beside the weights a wrapper may have tensors of its own, such as the best accuracy.

    Args:
        found: Where to look.
        depth: How many wrappers may follow.
        failed: Mappings that lead nowhere by their ``id``, and the depth searched there. One
            mapping may stand in many places, in itself too, and is not searched again for each.
    """
    if not isinstance(found, Mapping) or failed.get(id(found), (None, -1))[1] >= depth:
        return None
    for key in _WRAPPERS if depth else ():
        path = _wrappers(found.get(key), depth - 1, failed)
        if path is not None:
            return (key, *path)
    if any(isinstance(value, Tensor) for value in found.values()):
        return ()
    failed[id(found)] = (found, depth)  # kept, so that no other gets its id
    return None


def _shown(name: Any) -> str:
    """An entry's name; what is no text may have a very long one, or none that can be printed."""
    return name[:_MAX_NAME] if isinstance(name, str) else f"<{type(name).__name__}>"


def _written(about: About) -> dict[str, Any]:
    return {key: value for key, value in asdict(about).items() if key != "beside"}


def _about(texts: Mapping[str, str]) -> About:
    if _ABOUT not in texts:
        return About()
    try:
        found = json.loads(texts[_ABOUT])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"broken safetensors file: its metadata {_ABOUT!r} is no JSON object")
    words = {key: found.get(key, "") for key in ("model", "preprocessing", "labels")}
    options = found.get("options", {})
    if not all(isinstance(word, str) for word in words.values()) or not isinstance(options, dict):
        raise CheckpointError(f"broken safetensors file: its metadata {_ABOUT!r}")
    if not all(_plain(value) for value in options.values()):
        raise CheckpointError("broken safetensors file: options must be numbers, words and flags")
    return About(**words, options=options)


def parse_option(text: str) -> tuple[str, Any]:
    """An option of a model from ``NAME=VALUE``, the value in JSON as in a file's metadata.

    What is no JSON is a word; ``True``, ``False`` and ``None`` are understood too.

    Raises:
        ValueError: No name, or a value that no option has.
    """
    name, equals, word = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"must be NAME=VALUE, got {text!r}")
    value = {"True": True, "False": False, "None": None}.get(word, word)
    if value is word:
        try:
            value = json.loads(word)
        except (ValueError, RecursionError):
            value = word
    if not _plain(value):
        raise ValueError(f"must be a number, a word, a flag or a list of these, got {text!r}")
    return name, value


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= 64 and all(isinstance(n, (int, float, str)) for n in value)
    return value is None or isinstance(value, (int, float, str))


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], about: About | None = None
) -> None:
    """Write tensors as the path's suffix says; see :func:`read`.

    The file appears whole or not at all.
    """
    suffix = Path(path).suffix.lower()
    if about is not None and suffix != ".safetensors":
        raise CheckpointError(f"about: only .safetensors files can hold it, got {suffix!r}")
    if suffix == ".safetensors":
        texts = {_ABOUT: json.dumps(_written(about), sort_keys=True)} if about else None
        raw = _safetensors.serialize(tensors, texts)
    elif suffix == ".caffemodel":
        raw = _caffe.serialize(tensors)
    elif suffix == ".params":
        raw = _mxnet.serialize(tensors)
    elif suffix in SUFFIXES:
        stream = io.BytesIO()
        torch.save({key: value.detach().cpu().clone() for key, value in tensors.items()}, stream)
        raw = stream.getvalue()
    else:
        raise CheckpointError(f"path must end in {', '.join(SUFFIXES)}, got {suffix!r}")
    temporary = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(raw)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
