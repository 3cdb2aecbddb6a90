"""Shards behind URLs: what is enabled, what is kept secret, what is fetched, cached and retried."""

import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from commands import no_file_beyond
from PIL import Image

from compress.config import DataConfig, RunConfig, load_config, save_config
from compress.config.location import root_setting
from compress.data.batches import ImageData, TrainBatches, eval_batches
from compress.data.datasets import load_data
from compress.data.shards import store
from compress.data.shards.__main__ import main
from compress.data.shards.cache import ShardCache, _abandoned
from compress.data.shards.index import INDEX
from compress.errors import (
    CompressError,
    ConfigError,
    DataError,
    EnvironmentUnfitError,
    OutputError,
)

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 4 images: 6 to train on and 2 to validate on."""
    folder = tmp_path_factory.mktemp("packed")
    for half, count in (("train", 12), ("val", 4)):
        for label in range(2):
            (folder / "images" / half / str(label)).mkdir(parents=True)
            for number in range(count):
                pixels = np.full((9, 9, 3), 10 * number + label, dtype=np.uint8)
                path = folder / "images" / half / str(label) / f"{number}.png"
                Image.fromarray(pixels).save(path)
    assert main(["pack", str(folder / "images"), str(folder / "s"), "--images-per-shard", "4"]) == 0
    return folder / "s"


@pytest.fixture
def memory(packed: Path) -> Iterator[Any]:
    """The same shards in fsspec's memory of this process."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    for path in packed.rglob("*"):
        if path.is_file():
            system.pipe_file(f"/bucket/{path.relative_to(packed).as_posix()}", path.read_bytes())
    yield system
    system.store.clear()


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nothing waits; the pauses are listed."""
    found: list[float] = []
    monkeypatch.setattr(store, "sleep", found.append)
    return found


def config_of(cache: Path, **keys: Any) -> DataConfig:
    settings = {"dataset": "shards", "root": "memory://bucket", "schemes": ["memory"]}
    return DataConfig.model_validate({**settings, "image_size": 8, "cache": cache, **keys})


def remote(cache: Path, **keys: Any) -> ImageData:
    return load_data(config_of(cache, **keys))


def shards_in(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.tar"))


class Opened:
    """Counts what is opened at a URL, and breaks off connections."""

    def __init__(self, system: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.broken: list[Exception | int] = []
        real = system.__class__.open

        def open_it(this: Any, path: str, *arguments: Any, **options: Any) -> Any:
            if path.endswith(".tar"):
                self.names.append(path)
                if self.broken:
                    failure = self.broken.pop(0)
                    if isinstance(failure, Exception):
                        raise failure
                    return io.BytesIO(this.cat_file(path)[:failure])
            return real(this, path, *arguments, **options)

        monkeypatch.setattr(system.__class__, "open", open_it)


@pytest.fixture
def asked(memory: Any, monkeypatch: pytest.MonkeyPatch) -> Opened:
    return Opened(memory, monkeypatch)


# ---- what may be asked for, and what is never written -------------------------------------------


@pytest.mark.parametrize("scheme", ["s3", "https", "memory", "file", "gs"])
def test_a_scheme_must_be_enabled(scheme):
    url = f"{scheme}://bucket/folder"
    with pytest.raises(ConfigError, match=rf"not enabled: add --set .*data\.schemes=\[\"{scheme}"):
        DataConfig.model_validate({"dataset": "shards", "root": url})
    with pytest.raises(ConfigError, match="not enabled"):
        DataConfig.model_validate({"dataset": "shards", "root": url.upper(), "schemes": ["ftp"]})
    config = DataConfig.model_validate({"dataset": "shards", "root": url, "schemes": [scheme]})
    assert config.root == url


def test_only_shards_are_read_from_a_url():
    with pytest.raises(ConfigError, match=r"'imagefolder' is read from a folder"):
        DataConfig.model_validate(
            {"dataset": "imagefolder", "root": "s3://bucket", "schemes": ["s3"]}
        )


SECRETS = [
    "s3://someone:hunter2@bucket/x",
    "https://hunter2@host/x",
    "https://host/x?token=hunter2",
    "https://host/x#hunter2",
    "abfs://box:hunter2@account.dfs.core.windows.net/x",
    "sftp://someone:hunter2@host:22/x",
    "S3://someone:hunter2@bucket",
]


@pytest.mark.parametrize("url", SECRETS)
@pytest.mark.parametrize("key", ["data.root", "data.cache", "data.train_shards"])
def test_a_secret_in_a_url_is_refused_and_not_repeated(url, key, tmp_path):
    settings = [f"{key}={url}", "data.dataset=shards", 'data.schemes=["s3","https","abfs","sftp"]']
    for more in ([], ["data.image_size=7"], ["train.epochs=x"]):
        with pytest.raises(CompressError) as caught:
            load_config(settings=[*settings, *more])
        assert "hunter2" not in str(caught.value)
    (tmp_path / "run.toml").write_text(f'[data]\n{key.partition(".")[2]} = "{url}"\n')
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "run.toml"))
    assert "hunter2" not in str(caught.value)


def test_a_container_of_azure_is_no_secret():
    url = "abfs://box@account.dfs.core.windows.net/x"
    config = DataConfig.model_validate({"dataset": "shards", "root": url, "schemes": ["abfs"]})
    assert config.root == url


def test_urls_cannot_be_chained():
    with pytest.raises(ConfigError, match="chains URLs"):
        DataConfig.model_validate(
            {"dataset": "shards", "root": "https://a/b::file://c", "schemes": ["https"]}
        )


def test_a_url_survives_being_saved(tmp_path):
    settings = ["data.dataset=shards", "data.root=s3://bucket/a//b/", 'data.schemes=["s3"]']
    config = load_config(settings=settings)
    assert config.data.root == "s3://bucket/a//b"
    save_config(config, tmp_path / "config.toml")
    assert load_config(str(tmp_path / "config.toml")) == config


def test_a_url_survives_being_an_option():
    assert root_setting(Path("s3://bucket/x")) == "data.root=s3://bucket/x"
    assert root_setting(Path("file:///a/x")) == "data.root=file:///a/x"
    assert root_setting(Path("some/where")) == f"data.root={Path.cwd() / 'some' / 'where'}"


def test_a_folder_stays_a_path():
    assert RunConfig.model_validate({"data": {"root": "a/b"}}).data.root == Path("a/b")
    assert RunConfig.model_validate({"data": {"root": Path("a/b")}}).data.root == Path("a/b")


# ---- fetching -----------------------------------------------------------------------------------


def test_images_come_from_a_url_as_from_the_folder(packed, memory, tmp_path):
    here = load_data(DataConfig(dataset="shards", root=packed, image_size=8))
    there = remote(tmp_path)
    assert there.identity == here.identity
    assert there.classes == here.classes
    options = {"batch_size": 6, "seed": 1, "rank": 1, "ranks": 2}
    for one, other in zip(
        [*TrainBatches(here, **options).epoch(0), *eval_batches(here.val, batch_size=3)],
        [*TrainBatches(there, **options).epoch(0), *eval_batches(there.val, batch_size=3)],
        strict=True,
    ):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_opening_fetches_no_shard_and_reading_fetches_each_once(asked, tmp_path):
    data = remote(tmp_path)
    assert asked.names == []
    assert not shards_in(tmp_path)
    for _ in range(2):
        list(eval_batches(data.val, batch_size=3))
    assert asked.names == ["/bucket/val/val-000000.tar", "/bucket/val/val-000001.tar"]
    list(eval_batches(remote(tmp_path).val, batch_size=3))
    assert len(asked.names) == 2
    assert len(shards_in(tmp_path)) == 2


def test_an_epoch_that_is_resumed_fetches_only_what_it_needs(asked, tmp_path):
    batches = TrainBatches(remote(tmp_path, shuffle_shards=1), batch_size=4, seed=0)
    assert len(list(batches.epoch(0, start=5))) == 1
    assert len(asked.names) == 1


def test_a_new_index_makes_what_was_fetched_stale(asked, memory, tmp_path):
    list(eval_batches(remote(tmp_path).val, batch_size=8))
    list(eval_batches(remote(tmp_path).val, batch_size=8))
    assert len(asked.names) == 2
    tensors = safetensors.numpy.load(memory.cat_file(f"/bucket/{INDEX}"))
    tensors["labels"] = 1 - tensors["labels"]
    memory.pipe_file(f"/bucket/{INDEX}", safetensors.numpy.save(tensors))
    list(eval_batches(remote(tmp_path).val, batch_size=8))
    assert len(asked.names) == 4


@pytest.mark.parametrize(
    "failures",
    [
        [ConnectionResetError("reset")],
        [TimeoutError(), OSError("503"), RuntimeError("of some library")],
        [700, 0, 1],  # bytes after which the connection breaks off
    ],
)
def test_what_fails_for_a_moment_is_tried_again(packed, asked, tmp_path, pauses, failures):
    asked.broken = list(failures)
    (batch,) = eval_batches(remote(tmp_path).val, batch_size=8)
    assert len(batch.images) == 8
    fetched = {path.read_bytes() for path in shards_in(tmp_path)}
    assert fetched == {path.read_bytes() for path in packed.glob("val/*.tar")}
    assert pauses == [0.5, 1.0, 2.0][: len(failures)]


def test_a_second_try_begins_at_the_first_byte(packed, memory, tmp_path, pauses, monkeypatch):
    usual, broken = memory.__class__.open, []

    def breaking_off(self: Any, path: str, *options: Any, **named: Any) -> Any:
        stream = usual(self, path, *options, **named)
        if path.endswith(".tar") and not broken:
            broken.append(path)
            return io.BytesIO(stream.read(700))
        return stream

    monkeypatch.setattr(memory.__class__, "open", breaking_off)
    (batch,) = eval_batches(remote(tmp_path).val, batch_size=8)
    assert broken
    assert pauses == [0.5]
    assert len(batch.images) == 8
    fetched = {path.read_bytes() for path in shards_in(tmp_path)}
    assert fetched == {path.read_bytes() for path in packed.glob("val/*.tar")}


def test_after_some_tries_the_run_stops_and_no_secret_is_told(asked, tmp_path, pauses):
    data = remote(tmp_path)
    asked.broken = [OSError("https://host/x?signature=hunter2")] * 9
    with pytest.raises(DataError, match=r"val-000000\.tar .* \(OSError\): look at") as caught:
        list(eval_batches(data.val, batch_size=8))
    assert "hunter2" not in str(caught.value)
    assert len(asked.names) == 4
    assert len(pauses) == 3
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("lock")]


def test_what_is_forbidden_is_not_tried_again(asked, tmp_path):
    data = remote(tmp_path)
    asked.broken = [PermissionError("403")]
    with pytest.raises(DataError, match=r"\(PermissionError\)"):
        list(eval_batches(data.val, batch_size=8))
    assert len(asked.names) == 1


def test_a_shard_that_changed_or_is_gone(memory, tmp_path):
    data = remote(tmp_path)
    memory.pipe_file("/bucket/val/val-000000.tar", b"x" * 99)
    with pytest.raises(DataError, match=r"has 99 bytes, and its index says .*index again"):
        list(eval_batches(data.val, batch_size=8))
    memory.rm("/bucket/val/val-000000.tar")
    with pytest.raises(DataError, match=r"val/val-000000\.tar is not there"):
        list(eval_batches(data.val, batch_size=8))


def test_a_server_that_sends_without_end_fills_no_disk(asked, memory, tmp_path, monkeypatch):
    data = remote(tmp_path)

    class Endless(io.RawIOBase):
        sent = 0

        def read(self, size: int = -1) -> bytes:
            Endless.sent += size
            return b"x" * size

    monkeypatch.setattr(memory.__class__, "open", lambda *_, **__: Endless())
    with pytest.raises(DataError, match="and its index says"):
        list(eval_batches(data.val, batch_size=8))
    assert Endless.sent <= 2 * store.PIECE
    monkeypatch.setattr(store, "LARGEST_FILE", 2**16)
    with pytest.raises(DataError, match="it is no such file"):
        remote(tmp_path)


def test_a_url_without_an_index_says_how_to_make_one(memory, tmp_path):
    memory.rm(f"/bucket/{INDEX}")
    with pytest.raises(
        DataError, match=r"no index\.safetensors .* python -m compress\.data\.shards index"
    ):
        remote(tmp_path)


def test_a_host_that_is_not_reached_is_not_a_missing_index(tmp_path, pauses):
    pytest.importorskip("aiohttp")
    with socket.socket() as nobody:  # bound and not listening: whoever calls is refused
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        config = DataConfig(
            dataset="shards",
            schemes=("http",),
            root=f"http://127.0.0.1:{port}/bucket",
            image_size=8,
            cache=tmp_path,
        )
        with pytest.raises(DataError, match=r"ConnectorError\): look at the network") as caught:
            load_data(config)
    assert "no index" not in str(caught.value)
    assert len(pauses) == 3


def test_a_server_that_answers_that_there_is_no_index_is_believed(tmp_path, pauses):
    pytest.importorskip("aiohttp")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = DataConfig(
            dataset="shards",
            schemes=("http",),
            root=f"http://127.0.0.1:{server.server_port}/bucket",
            image_size=8,
            cache=tmp_path / "cache",
        )
        with pytest.raises(DataError, match=r"there is no index\.safetensors under http"):
            load_data(config)
        server.shutdown()
    assert pauses == []


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    config = config_of(tmp_path, root="nosuch://bucket", schemes=["nosuch"])
    with pytest.raises(EnvironmentUnfitError, match="cannot open nosuch URLs here"):
        load_data(config)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(EnvironmentUnfitError, match=r"pip install 'compress-convnets\[shards\]'"):
        load_data(config)


def test_a_cache_that_is_too_small_for_a_window_is_refused(packed, memory, tmp_path):
    largest = max(path.stat().st_size for path in packed.glob("*/*.tar"))
    with pytest.raises(ConfigError, match=r"data\.cache_gib = .* cannot hold the 3 training"):
        remote(tmp_path, shuffle_shards=3, cache_gib=(3 * largest - 1) / 2**30)
    remote(tmp_path, shuffle_shards=3, cache_gib=3 * largest / 2**30)


def test_the_cache_stays_below_its_limit_through_an_epoch(packed, asked, tmp_path):
    largest = max(path.stat().st_size for path in packed.glob("*/*.tar"))
    data = remote(tmp_path, shuffle_shards=2, cache_gib=2 * largest / 2**30)
    batches = TrainBatches(data, batch_size=3, seed=0)
    for _ in batches.epoch(0):
        assert sum(path.stat().st_size for path in shards_in(tmp_path)) <= 2 * largest
    # Each once: no shard of a window has gone before it was read.
    assert len(asked.names) == len(set(asked.names)) == 6


def test_the_next_window_is_fetched_while_one_is_read(asked, tmp_path):
    batches = TrainBatches(remote(tmp_path, shuffle_shards=2), batch_size=2, seed=0)
    reading = batches.epoch(0)
    for window in range(1, 4):  # four steps each
        labels = [len(next(reading).labels) for _ in range(3)]
        assert labels == [2, 2, 2]
        until(tmp_path, min(6, 2 * window + 2))
        next(reading)
    assert next(reading, None) is None
    assert len(asked.names) == len(set(asked.names)) == 6


def until(cache: Path, shards: int) -> None:
    """Wait for as many shards in a cache."""
    end = time.monotonic() + 120
    while len(shards_in(cache)) < shards:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert len(shards_in(cache)) == shards


def test_workers_fetch_ahead_too(packed, tmp_path):
    keys = {"root": f"file://{packed}", "schemes": ["file"], "shuffle_shards": 3}
    batches = TrainBatches(remote(tmp_path, **keys), batch_size=2, seed=0, workers=2, prefetch=1)
    reading = batches.epoch(0)
    next(reading)  # three steps are asked for, of the six of the first window
    until(tmp_path, 6)
    here = TrainBatches(load_data(config_of(tmp_path, **keys)), batch_size=2, seed=0)
    for one, other in zip(reading, list(here.epoch(0))[1:], strict=True):
        assert torch.equal(one.images, other.images)
    batches.close()


@pytest.mark.parametrize(
    ("windows", "ranks", "ahead"), [(3, 1, True), (2, 1, False), (3, 2, False)]
)
def test_nothing_is_fetched_ahead_that_the_cache_cannot_keep(
    windows, ranks, ahead, packed, memory, tmp_path, monkeypatch
):
    largest = sorted(path.stat().st_size for path in packed.glob("train/*.tar"))
    room = sum(largest[-windows:])  # of one shard each
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    data = remote(tmp_path, shuffle_shards=1, cache_gib=room / 2**30)
    plan = data.train.ahead(np.arange(24).reshape(6, 4))
    assert plan == ([(1,), (2,), (3,), (4,), (5,), ()] if ahead else [()] * 6)


def test_shards_on_disk_are_not_fetched(packed):
    data = load_data(DataConfig(dataset="shards", root=packed, image_size=8, shuffle_shards=1))
    assert data.train.ahead(np.arange(24).reshape(6, 4)) == [()] * 6


def test_what_fails_in_the_background_is_told_when_it_is_read(asked, memory, packed, tmp_path):
    largest = max(path.stat().st_size for path in packed.glob("*/*.tar"))
    options = {"shuffle_shards": 1, "cache_gib": largest / 2**30}
    list(TrainBatches(remote(tmp_path / "1", **options), batch_size=4, seed=0).epoch(0))
    order = asked.names[:]
    assert len(order) == 6
    memory.rm(order[1])
    reading = TrainBatches(remote(tmp_path, shuffle_shards=1), batch_size=4, seed=0).epoch(0)
    next(reading)
    while order[1] not in asked.names[6:]:
        time.sleep(0.01)
    with pytest.raises(DataError, match=f"the shard {order[1].removeprefix('/bucket/')} is not"):
        next(reading)


def test_the_usual_cache_is_below_the_users_cache_directory(memory, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = {"dataset": "shards", "root": "memory://bucket", "schemes": ["memory"]}
    list(eval_batches(load_data(DataConfig.model_validate(settings)).val, batch_size=8))
    assert len(shards_in(tmp_path / "compress" / "shards")) == 2


# ---- cache --------------------------------------------------------------------------------------


def key(number: int) -> str:
    return f"{number:040x}"


def put(cache: ShardCache, number: int, length: int = 100) -> None:
    cache.open(key(number), length, lambda file: file.write(bytes([number]) * length)).close()


def held(cache: ShardCache) -> set[int]:
    return {int(path.stem, 16) for path in shards_in(cache.folder)}


def aged(cache: ShardCache, number: int, hours: float) -> None:
    when = time.time() - 3600 * hours
    os.utime(cache.folder / f"{key(number)}.tar", (when, when))


def test_what_was_not_read_for_longest_goes_first(tmp_path):
    cache = ShardCache(tmp_path, 300)
    for number in (1, 2, 3):
        put(cache, number)
        aged(cache, number, 10 - number)
    put(cache, 1)  # read again
    put(cache, 4)
    assert held(cache) == {1, 3, 4}
    put(cache, 5, length=200)
    assert len(held(cache)) == 2
    assert 5 in held(cache)
    assert 3 not in held(cache)


def test_other_files_are_neither_counted_nor_removed(tmp_path):
    for name in ("mine.tar", "notes.txt", f"{key(1)}.zip", f"x{key(1)}.tar"):
        (tmp_path / name).write_bytes(bytes(1000))
    cache = ShardCache(tmp_path, 100)
    put(cache, 1)
    put(cache, 2)
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith("lock")}
    assert names == {"mine.tar", "notes.txt", f"{key(1)}.zip", f"x{key(1)}.tar", f"{key(2)}.tar"}


def test_an_open_file_is_read_to_its_end_though_it_was_removed(tmp_path):
    cache = ShardCache(tmp_path, 100)
    stream = cache.open(key(7), 100, lambda file: file.write(b"a" * 100))
    put(cache, 8)
    assert held(cache) == {8}
    assert stream.read() == b"a" * 100
    stream.close()


def test_a_file_of_another_size_is_fetched_again(tmp_path):
    cache = ShardCache(tmp_path, 1000)
    put(cache, 1)
    (tmp_path / f"{key(1)}.tar").write_bytes(b"short")
    put(cache, 1)
    assert (tmp_path / f"{key(1)}.tar").read_bytes() == b"\1" * 100


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_many_readers_at_once_read_what_they_asked_for_and_keep_the_limit(tmp_path):
    cache = ShardCache(tmp_path, 350)
    fetches: list[int] = []
    reads: list[int] = []
    wrong: list[int] = []
    together = threading.Barrier(8)

    def read(reader: int) -> None:
        together.wait()
        for step in range(12):
            number = 1 + (step // 4 + (reader % 2)) % 4

            def fill(file: Any, number: int = number) -> None:
                fetches.append(number)
                file.write(bytes([number]) * 100)

            with cache.open(key(number), 100, fill) as stream:
                if stream.read() != bytes([number]) * 100:
                    wrong.append(number)
            reads.append(number)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(reads) == 96
    assert not list(tmp_path.glob(".*.part"))
    assert sum(path.stat().st_size for path in shards_in(tmp_path)) <= 350
    assert set(fetches) == {1, 2, 3, 4}


def test_readers_of_the_same_file_wait_for_the_first(tmp_path):
    cache = ShardCache(tmp_path, 1000)
    fetches: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def fill(file: Any) -> None:
        fetches.append(1)
        begun.set()
        go_on.wait(300)
        file.write(b"a" * 100)

    def read() -> None:
        cache.open(key(1), 100, fill).close()

    threads = [threading.Thread(target=read) for _ in range(4)]
    threads[0].start()
    assert begun.wait(300)
    for thread in threads[1:]:
        thread.start()
    assert not shards_in(tmp_path)
    go_on.set()
    for thread in threads:
        thread.join()
    assert fetches == [1]


def test_a_fetch_waits_for_room_that_another_takes(tmp_path):
    cache = ShardCache(tmp_path, 150)
    said: list[str] = []
    begun = threading.Event()

    def first(file: Any) -> None:
        begun.set()
        said.append("first begins")
        file.write(b"a" * 100)
        other.join(0.3)  # it cannot end, for it waits
        said.append("first ends")

    def second(file: Any) -> None:
        said.append("second begins")
        file.write(b"b" * 100)

    def read() -> None:
        begun.wait(300)
        cache.open(key(2), 100, second).close()

    other = threading.Thread(target=read)
    other.start()
    cache.open(key(1), 100, first).close()
    other.join()
    assert said == ["first begins", "first ends", "second begins"]
    assert held(cache) == {2}


KILLED = """
import os, signal, sys
from pathlib import Path
from compress.data.shards.cache import ShardCache

def fill(file):
    file.write(b"x" * 50)
    os.kill(os.getpid(), signal.SIGKILL)

ShardCache(Path(sys.argv[1]), 250).open(sys.argv[2], 200, fill)
"""


def test_what_a_killed_process_leaves_blocks_nobody_and_is_removed(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), key(1)], check=False)
    assert killed.returncode == -9
    assert len(list(tmp_path.glob(".*.part"))) == 1
    cache = ShardCache(tmp_path, 250)
    put(cache, 1, length=200)
    assert (tmp_path / f"{key(1)}.tar").read_bytes() == b"\1" * 200
    assert not list(tmp_path.glob(".*.part"))


def test_a_full_disk_is_an_output_error_and_leaves_nothing(memory, tmp_path):
    data = remote(tmp_path)
    with no_file_beyond(5000), pytest.raises(OutputError, match="cannot write"):
        list(eval_batches(data.val, batch_size=8))
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("lock")]
    assert len(list(eval_batches(data.val, batch_size=8))) == 1


def test_a_cache_that_cannot_be_made_is_an_output_error(memory, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        list(eval_batches(remote(tmp_path / "file").val, batch_size=8))


def test_a_shard_is_locked_until_it_has_its_name(tmp_path, monkeypatch):
    """Who makes room meanwhile must not take it for what a kill has left."""
    taken_for_left, replace = [], Path.replace

    def late(part, path):
        taken_for_left.append(_abandoned(part))
        return replace(part, path)

    monkeypatch.setattr(Path, "replace", late)
    with ShardCache(tmp_path, 10).open("0" * 40, 4, lambda file: file.write(b"abcd")) as stream:
        assert stream.read() == b"abcd"
    assert taken_for_left == [False]
