# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints: their key formats, their files, what their networks expect of a picture.

``load(model, path)`` fills a model of ``pydense.models`` from a file of the codes that published
it, ``convert`` and ``save`` write one for them. Each family of models has a table of its formats in
a module of its own; ``formats(model)`` lists them.
"""

from ._errors import CheckpointError
from ._files import About, read, write
from ._load import Report, convert, formats, load, plan, save
from .preprocessing import PREPROCESSING, Preprocessing

__all__ = [
    "PREPROCESSING",
    "About",
    "CheckpointError",
    "Preprocessing",
    "Report",
    "convert",
    "formats",
    "load",
    "plan",
    "read",
    "save",
    "write",
]
