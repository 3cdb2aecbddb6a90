"""How a data set of shards is opened: its index, its classes, and everything that can be wrong."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compress.config import DataConfig
from compress.data.shards.index import INDEX, Shard, ShardIndex, index_of, parsed_index, read_shard
from compress.data.shards.store import Folder, Remote, Store, resized
from compress.data.walking import require_distinct
from compress.errors import ConfigError, DataError, EnvironmentUnfitError

logger = logging.getLogger("compress")

CLASSES = "classes.txt"
MANY_SHARDS = 64
"""From here on the user is told that an index would save time."""


class Shards(NamedTuple):
    """A data set of shards; no image was decoded."""

    store: Store
    train: ShardIndex
    val: ShardIndex
    classes: tuple[str, ...]
    """Class names, by label."""


def open_shards(config: DataConfig) -> Shards:
    """Find the images of a data set of shards, by its index if there is one.

    Raises:
        ConfigError: both halves name the same shard, or the cache is too small.
        DataError: shards are missing or damaged, the index is not theirs, or labels are no classes.
        EnvironmentUnfitError: a library for the URL is missing.
    """
    store = _store(config)
    patterns = config.train_shards, config.val_shards
    train, val = _remote(store, patterns) if isinstance(store, Remote) else _local(store, patterns)
    for key, pattern, half in zip(("train", "val"), patterns, (train, val), strict=True):
        if not half.shards:
            raise DataError(f"no shard under {store.title} matches data.{key}_shards = {pattern!r}")
    both = set(train.shards) & set(val.shards)
    if both:
        raise ConfigError(
            f"data.train_shards and data.val_shards both match {min(both)}: the network would be "
            "validated on its training images"
        )
    if isinstance(store, Remote):
        _check_cache(config, train, val)
    classes = _classes(store, train, val)
    require_distinct(classes, f"{CLASSES} under {store.title}")
    _warn_if_sorted(train, config.shuffle_shards, len(classes))
    return Shards(store, train, val, classes)


def read_shards(store: Folder, names: Iterable[str]) -> Iterator[Shard]:
    """Read the headers of shards on disk.

    Raises:
        DataError: a shard is damaged or cannot be read.
    """
    for name in names:
        length = store.size(name)
        try:
            with (store.root / name).open("rb") as stream:
                yield read_shard(stream, length, name)
        except OSError as error:
            raise DataError(
                f"cannot read {store.root / name}: {error.strerror or error}"
            ) from error


def _store(config: DataConfig) -> Folder | Remote:
    if isinstance(config.root, str):
        try:
            from compress.data.shards.cache import ShardCache
        except ImportError as error:
            raise EnvironmentUnfitError(
                "shards at a URL are fetched under file locks, which only POSIX systems have: copy "
                "them into a folder, and name that in data.root"
            ) from error
        usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "compress" / "shards"
        folder = (config.cache or usual).expanduser()
        return Remote(config.root, ShardCache(folder, int(config.cache_gib * 2**30)))
    assert config.root is not None
    root = config.root.expanduser()
    if not root.is_dir():
        raise DataError(f"data.root = {root} does not exist: name the folder of the shards")
    return Folder(root)


def _remote(store: Remote, patterns: tuple[str, str]) -> tuple[ShardIndex, ShardIndex]:
    data = store.read_small(INDEX)
    if data is None:
        raise DataError(
            f"there is no {INDEX} under {store.title}, without which every shard would have to be "
            "fetched: run python -m compress.data.shards index ROOT on a disk that holds the "
            f"shards, and put {INDEX} beside them"
        )
    store.edition = hashlib.sha256(data).hexdigest()
    index = parsed_index(data, f"{store.title}/{INDEX}")
    return index.matching(patterns[0]), index.matching(patterns[1])


def _local(store: Folder, patterns: tuple[str, str]) -> tuple[ShardIndex, ShardIndex]:
    data = store.read_small(INDEX)
    index = None if data is None else parsed_index(data, f"{store.title}/{INDEX}")
    train, val = (_half(store, pattern, index) for pattern in patterns)
    return train, val


def _half(store: Folder, pattern: str, index: ShardIndex | None) -> ShardIndex:
    """Return the index of the shards on disk that match a pattern."""
    names = store.names(pattern)
    if index is None:
        if len(names) >= MANY_SHARDS:
            logger.warning(
                "reading the headers of %d shards; python -m compress.data.shards index %s, run "
                "once, makes this instant",
                len(names),
                store.title,
            )
        return index_of(read_shards(store, names))
    found = index.matching(pattern)
    if set(found.shards) != set(names):
        name = min(set(found.shards) ^ set(names))
        what = "is not in its index" if name in names else "is in its index and is gone"
        raise DataError(
            f"the shard {name} under {store.title} {what}: make the index again with "
            f"python -m compress.data.shards index {store.title}"
        )
    for name, length in zip(found.shards, found.shard_bytes.tolist(), strict=True):
        if store.size(name) != length:
            raise resized(store.title, name, store.size(name), length)
    return found


def _check_cache(config: DataConfig, train: ShardIndex, val: ShardIndex) -> None:
    """Refuse a cache from which shards would go before they are read."""
    window = int(np.sort(train.shard_bytes)[-config.shuffle_shards :].sum())
    needed = max(window, int(val.shard_bytes.max()))
    if needed > config.cache_gib * 2**30:
        raise ConfigError(
            f"data.cache_gib = {config.cache_gib:g} cannot hold the {config.shuffle_shards} "
            f"training shards that are mixed with each other ({needed / 2**30:.3g} GiB): raise it, "
            "or lower data.shuffle_shards"
        )


def _classes(store: Store, train: ShardIndex, val: ShardIndex) -> tuple[str, ...]:
    """Return the class names, after a look at every label."""
    content = store.read_small(CLASSES)
    if content is None:
        return _numbered(store, train, val)
    try:
        names = content.decode("utf-8").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{CLASSES} under {store.title} is not UTF-8 text") from error
    if "" in map(str.strip, names) or len(set(names)) < len(names) or not names:
        raise DataError(
            f"{CLASSES} under {store.title} must name a class on every line, and each class once"
        )
    for half in (train, val):
        wrong = np.flatnonzero(half.labels >= len(names))
        if len(wrong):
            raise DataError(
                f"{_sample(half, int(wrong[0]))} is of class {half.labels[wrong[0]]}, and "
                f"{CLASSES} names {len(names)} classes, from 0"
            )
    return tuple(name.strip() for name in names)


def _numbered(store: Store, train: ShardIndex, val: ShardIndex) -> tuple[str, ...]:
    """Return the numbers of the classes as their names; a gap is a wrong label, most often."""
    seen = np.unique(train.labels)
    gaps = np.flatnonzero(seen != np.arange(len(seen)))
    unknown = np.flatnonzero(~np.isin(val.labels, seen))
    if len(gaps):
        raise DataError(
            f"no training image under {store.title} is of class {gaps[0]}, and some are of class "
            f"{seen[-1]}: mend the labels, or name the classes in {CLASSES}"
        )
    if len(unknown):
        raise DataError(
            f"{_sample(val, int(unknown[0]))} is of class {val.labels[unknown[0]]}, of which there "
            f"is no training image: mend the labels, or name the classes in {CLASSES}"
        )
    return tuple(map(str, seen.tolist()))


def _sample(half: ShardIndex, image: int) -> str:
    name = half.name_of(image).decode("utf-8", "backslashreplace")
    return f"{name} in the shard {half.shards[half.shard_of(image)]}"


def _warn_if_sorted(train: ShardIndex, window: int, classes: int) -> None:
    """Say so if no order of the shards can give batches of mixed classes."""
    if len(train.shards) <= window:
        return
    most = max(
        len(np.unique(train.labels[start:end]))
        for start, end in zip(train.first[:-1], train.first[1:], strict=True)
    )
    if window * most * 2 < classes:
        logger.warning(
            "no shard has images of more than %d of the %d classes, and %d shards are mixed: "
            "batches will be of few classes; pack the images in random order, or raise "
            "data.shuffle_shards",
            most,
            classes,
            window,
        )
