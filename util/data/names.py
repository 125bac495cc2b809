"""Recognise the same images again: a hash of their names."""

from __future__ import annotations

import hashlib
import os

import numpy as np

from util.data import sources, tar_shards


def digest(source: sources.Source) -> str | None:
    """Return a hash of the ordered names of all images; None where a source does not know them without reading.

    It stays the same where the folder has moved. 1.3 million names take half a second.
    """
    found = hashlib.blake2b(digest_size=16)
    if isinstance(source, sources.Chosen):
        found.update(np.asarray(source.indices, dtype=np.int64).tobytes() + str(digest(source.source)).encode())
    elif isinstance(source, sources.Files):
        _add(found, source.paths)
    elif isinstance(source, tar_shards.TarShards):
        _add(found, sources.Strings(map(str, source.shards)))
        _add(found, source.names)
        found.update(np.asarray(source.ends, dtype=np.int64).tobytes())
    else:
        return None
    return found.hexdigest()


def _add(found, texts: sources.Strings) -> None:
    """Add `texts` without the folder that the first and the last have in common."""
    if not len(texts):
        return
    shared = len(os.path.dirname(os.path.commonprefix([os.fsencode(texts[0]), os.fsencode(texts[len(texts) - 1])])))
    for text in texts.encoded():
        found.update(text[shared:])
        found.update(b"\0")
