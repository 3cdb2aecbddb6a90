import errno
import io
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional

import compress.data.batches
from compress.config import DataConfig, RunConfig
from compress.data.datasets import load_data
from compress.data.decoding import Decoder, decode_rgb, has_jpeg_operator
from compress.data.loading import Batch, Draw, FileImages, ImageSet, Reply, TensorImages
from compress.data.views import CACHED_VALUES, View
from compress.data.workers import Reader
from compress.errors import DataError
from compress.runs.loop import train_batches

# Newer Pythons warn about worker processes, which does not matter to these tests.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DECODERS: tuple[Decoder, ...] = ("pil", "tensor")


class Numbered(ImageSet):
    """Image i is the number i; beside it lie its reader's process and that one's threads."""

    def __len__(self) -> int:
        return 1000

    def fetch(self, request: Draw) -> Reply:
        facts = [[int(i), os.getpid(), torch.get_num_threads()] for i in request.indices]
        images = torch.tensor(facts, dtype=torch.float64).view(-1, 3, 1, 1)
        return Reply(Batch(images, torch.from_numpy(request.indices), 0), "")


def asked(first: int, count: int, size: int = 2) -> list[Draw]:
    """Return requests for ``count`` batches, from image ``first`` on."""
    order = np.arange(first, first + count * size).reshape(count, size)
    return [Draw(indices, None) for indices in order]


def labels(batches: list[Batch]) -> list[list[int]]:
    return [batch.labels.tolist() for batch in batches]


def processes(batches: list[Batch]) -> set[int]:
    return {int(pid) for batch in batches for pid in batch.images[:, 1]}


def wanted(first: int, count: int, size: int = 2) -> list[list[int]]:
    return [request.indices.tolist() for request in asked(first, count, size)]


def children() -> dict[int | None, multiprocessing.process.BaseProcess]:
    return {child.pid: child for child in multiprocessing.active_children()}


# ---- workers -----------------------------------------------------------------------------------


def test_workers_stay_from_epoch_to_epoch():
    reader = Reader(Numbered(), workers=2)
    epochs = [list(reader.read(asked(100 * epoch, 6))) for epoch in range(3)]
    assert [labels(epoch) for epoch in epochs] == [wanted(100 * epoch, 6) for epoch in range(3)]
    assert len(processes(epochs[0])) == 2
    assert os.getpid() not in processes(epochs[0])
    assert processes(epochs[0]) == processes(epochs[1]) == processes(epochs[2])


@pytest.mark.filterwarnings("error:This DataLoader")
def test_more_workers_than_cores_are_started_without_a_warning():
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with pytest.warns(UserWarning, match="worker"):  # else there would be nothing to silence
            DataLoader(Numbered(), num_workers=3)
        reader = Reader(Numbered(), workers=3)
        assert len(processes(list(reader.read(asked(0, 9))))) == 3
        assert labels(list(reader.read(asked(100, 3)))) == wanted(100, 3)
    finally:
        os.sched_setaffinity(0, cores)


def test_without_workers_this_process_reads():
    found = list(Reader(Numbered()).read(asked(0, 3)))
    assert labels(found) == wanted(0, 3)
    assert processes(found) == {os.getpid()}


def test_a_worker_computes_in_one_thread():
    torch.set_num_threads(2)
    (batch,) = Reader(Numbered(), workers=1).read(asked(0, 1))
    assert batch.images[:, 2].tolist() == [[[1.0]], [[1.0]]]
    (batch,) = Reader(Numbered()).read(asked(0, 1))
    assert batch.images[:, 2].tolist() == [[[2.0]], [[2.0]]]


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_an_epoch_that_was_left_leaks_nothing_into_the_next(taken):
    reader = Reader(Numbered(), workers=2, prefetch=3)
    pids = processes(list(reader.read(asked(0, 4))))
    for start in (200, 400):
        left = reader.read(asked(start, 20))
        assert labels([next(left) for _ in range(taken)]) == wanted(start, taken)
        del left
        found = list(reader.read(asked(start + 100, 9)))
        assert labels(found) == wanted(start + 100, 9)
        assert processes(found) == pids


def test_two_epochs_at_once_do_not_mix():
    reader = Reader(Numbered(), workers=1)
    pairs = list(zip(reader.read(asked(0, 5)), reader.read(asked(500, 5)), strict=True))
    assert labels([first for first, _ in pairs]) == wanted(0, 5)
    assert labels([second for _, second in pairs]) == wanted(500, 5)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_prefetch_is_the_number_of_batches_that_a_worker_is_ahead(workers, prefetch):
    drawn: list[int] = []

    def requests() -> Iterator[Draw]:
        for number, request in enumerate(asked(0, 20)):
            drawn.append(number)
            yield request

    reading = Reader(Numbered(), workers=workers, prefetch=prefetch).read(requests())
    for taken in range(1, 4):
        next(reading)
        assert len(drawn) == workers * prefetch + taken


def test_closing_ends_the_workers_and_reading_again_starts_others():
    reader = Reader(Numbered(), workers=2)
    first = processes(list(reader.read(asked(0, 4))))
    assert first <= children().keys()
    reader.close()
    assert not first & children().keys()
    second = processes(list(reader.read(asked(0, 4))))
    assert len(second) == 2
    assert not first & second
    del reader
    assert not second & children().keys()


def test_workers_that_cannot_be_started_are_a_data_error(monkeypatch):
    def refuse(self) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    reader = Reader(Numbered(), workers=3)
    with monkeypatch.context() as patched:
        patched.setattr(multiprocessing.process.BaseProcess, "start", refuse)
        with pytest.raises(DataError, match=r"3 processes .* started \(Resource .*data\.workers"):
            next(reader.read(asked(0, 2)))
    assert labels(list(reader.read(asked(0, 2)))) == wanted(0, 2)


def test_a_worker_that_dies_during_a_training_step_is_told_with_the_next_batch():
    reader = Reader(Numbered(), workers=1, prefetch=1)
    epoch = reader.read(asked(0, 10))
    (victim,) = processes([next(epoch)])
    process = children()[victim]
    os.kill(victim, signal.SIGKILL)
    multiprocessing.connection.wait([process.sentinel])
    torch.zeros(1).add_(1)  # the step goes on
    with pytest.raises(DataError, match=r"1 processes .* died.*data\.workers"):
        list(epoch)
    again = list(reader.read(asked(50, 3)))
    assert labels(again) == wanted(50, 3)
    assert victim not in processes(again)


# The memory killer strikes at any moment: this worker dies with every lock that it can get hold of.
LOCKED = """
import gc, os, signal
from multiprocessing.synchronize import SemLock
import numpy as np, torch
from compress.errors import DataError
from compress.data.loading import Batch, ImageSet, Reply, Draw
from compress.data.workers import Reader

class Images(ImageSet):
    def __len__(self):
        return 8

    def fetch(self, request):
        if request.indices[0] == 4:
            locks = [found for found in gc.get_objects() if isinstance(found, SemLock)]
            assert any([lock.acquire(block=False) for lock in locks])
            os.kill(os.getpid(), signal.SIGKILL)
        return Reply(Batch(torch.zeros(1, 1, 1, 1), torch.from_numpy(request.indices), 0), "")

reader = Reader(Images(), workers=2)
requests = [Draw(np.array([number]), None) for number in range(8)]
try:
    list(reader.read(requests))
except DataError as error:
    print(error)
print(*[batch.labels.item() for batch in reader.read(requests[:4])])
"""


@pytest.mark.slow  # torch waits for each worker before it kills it
def test_a_worker_that_dies_with_the_locks_in_its_hands_keeps_nobody_waiting():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOCKED], capture_output=True, text=True, timeout=300
    )
    told, again = done.stdout.splitlines()
    assert "2 processes that decode images died" in told
    assert again == "0 1 2 3"


class Failing(Numbered):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def fetch(self, request: Draw) -> Reply:
        raise self.error


@pytest.mark.parametrize("error", [EOFError("no more"), ConnectionResetError("the network")])
def test_an_error_of_the_image_set_is_not_taken_for_a_death(error):
    with pytest.raises(type(error), match=str(error)):
        list(Reader(Failing(error), workers=1).read(asked(0, 2)))


@pytest.mark.parametrize("error", [DataError("damaged"), ConnectionResetError("the network")])
def test_an_error_ends_the_workers_while_its_traceback_is_still_held(error):
    before = children().keys()
    with pytest.raises(type(error)) as caught:
        list(Reader(Failing(error), workers=2).read(asked(0, 4)))
    assert children().keys() <= before
    assert caught.value is not error  # it came from a worker


@pytest.mark.parametrize(
    "error",
    [ConnectionResetError(104, "reset"), EOFError(), ConnectionRefusedError(111, "refused")],
)
def test_a_batch_that_died_with_its_worker_is_a_data_error(error, monkeypatch):
    def lost(*arguments: object) -> None:
        raise error

    reader = Reader(Numbered(), workers=1)
    epoch = reader.read(asked(0, 5))
    next(epoch)
    monkeypatch.setattr("torch.multiprocessing.reductions.rebuild_storage_fd", lost)
    with pytest.raises(DataError, match=r"died.*lower data\.workers"):
        list(epoch)


def test_signals_from_elsewhere_do_not_end_a_worker():
    reader = Reader(Numbered(), workers=1)
    (worker,) = processes(list(reader.read(asked(0, 1))))
    for name in ("INT", "TERM", "INT"):
        subprocess.run(["kill", f"-{name}", str(worker)], check=True)
    assert processes(list(reader.read(asked(0, 20)))) == {worker}


def test_the_reading_process_may_end_a_worker():
    reader = Reader(Numbered(), workers=1)
    (worker,) = processes(list(reader.read(asked(0, 1))))
    process = children()[worker]
    process.terminate()
    process.join()  # multiprocessing does the same when Python exits, and waits as long
    assert process.exitcode == 0


# What a process of its own does with two workers: it is signalled as a terminal's group is, reads
# on, and leaves in the middle of the next epoch.
GROUP = """
import signal, sys, time
import numpy as np, torch
from compress.data.loading import Draw, TensorImages
from compress.data.views import View
from compress.data.workers import Reader

heard = []
if sys.argv[1] == "handled":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: heard.append(print(number, flush=True)))
images = TensorImages(torch.zeros(8, 1, 8, 8), torch.arange(8), View(8, "none", (0.0,), (1.0,)))
reader = Reader(images, workers=2)
requests = [Draw(np.arange(8), None)] * 40
epoch = reader.read(requests)
next(epoch)
try:
    print("ready", flush=True)
    while len(heard) < 2:
        time.sleep(0.01)
except KeyboardInterrupt:
    print("interrupted", flush=True)
print(sum(1 for _ in epoch), flush=True)
epoch = reader.read(requests)
next(epoch)
sys.exit(3)
"""


def group(mode: str, *signals: signal.Signals) -> tuple[int, list[str], str]:
    """Run ``GROUP``, signal its whole process group, and return its code, its lines and stderr."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", GROUP, mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for number in signals:
            os.killpg(process.pid, number)
        out, err = process.communicate(timeout=300)
        return process.returncode, sorted(out.splitlines()), err


@pytest.mark.slow
def test_signals_to_the_whole_group_are_handled_once_and_reading_goes_on():
    found = group("handled", signal.SIGINT, signal.SIGTERM)
    assert found == (3, [str(int(signal.SIGTERM)), str(int(signal.SIGINT)), "39"], "")


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_leaves_the_workers_alone():
    assert group("plain", signal.SIGINT) == (3, ["39", "interrupted"], "")


# ---- pixels ------------------------------------------------------------------------------------


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def photograph(height: int = 75, width: int = 100, seed: int = 0) -> Image.Image:
    """Return smooth colours with a little noise, of the statistics that JPEG is made for."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(pixels(6, 8, 3, seed=seed)).resize((width, height))
    return Image.fromarray(
        (np.asarray(coarse) + rng.normal(0, 6, (height, width, 3))).clip(0, 255).astype(np.uint8)
    )


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "shape",
    [(5, 3, 7, 9), (3, 3, 160, 160), (130, 1, 32, 32), (0, 3, 8, 8)],
    ids=["small", "each alone", "several at once", "none"],
)
def test_normalisation_is_exact_to_the_last_bit(shape, monkeypatch):
    view = View(8, "none", MEAN[: shape[1]], STD[: shape[1]])
    raw = pixels(*shape)
    mean, std = (np.float32(values).reshape(1, -1, 1, 1) for values in (view.mean, view.std))
    for source, scaled in (
        (raw, raw.astype(np.float32) * np.float32(1 / 255)),
        (raw.astype(np.float32) / 256, raw.astype(np.float32) / 256),
    ):
        before = source.copy()
        found = view.scale.normalise(torch.from_numpy(source))
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), (scaled - mean) / std)
        np.testing.assert_array_equal(source, before)
        with monkeypatch.context() as patched:
            patched.setattr("compress.data.views.CACHED_VALUES", source.size)
            at_once = view.scale.normalise(torch.from_numpy(source))
        np.testing.assert_array_equal(at_once, found)  # the way of a GPU, on this processor
        np.testing.assert_array_equal(source, before)
        batch = Batch(torch.from_numpy(source), torch.arange(len(source)), 0, view.scale)
        images, labels = batch.to("cpu", torch.channels_last)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images, found)
        assert torch.equal(labels, batch.labels)
        assert torch.equal(batch.normalised().images, found)
        assert batch.normalised().normalised().scale is None
        parts = list(batch.parts(2))
        assert torch.equal(torch.cat([part.to("cpu")[0] for part in parts]), found)
        assert torch.equal(torch.cat([part.labels for part in parts]), labels)


def test_images_of_every_size_are_normalised_in_the_cache():
    assert CACHED_VALUES * 4 <= 2**20  # the second cache of any core of the last ten years


JPEGS = {
    "colour": encoded(photograph()),
    "chroma in full": encoded(photograph(), subsampling=0, quality=95),
    "progressive": encoded(photograph(), progressive=True),
    "grey": encoded(photograph().convert("L")),
    "of ink": encoded(photograph().convert("CMYK")),
    "odd size": encoded(photograph(61, 43)),
}
OTHERS = {
    "png": encoded(photograph(), "PNG"),
    "transparent": encoded(photograph().convert("RGBA"), "PNG"),
    "palette": encoded(photograph().convert("P"), "PNG"),
    "bmp": encoded(photograph(), "BMP"),
}


@pytest.mark.parametrize("name", [*JPEGS, *OTHERS])
def test_the_decoders_agree_on_every_pixel(name):
    data = (JPEGS | OTHERS)[name]
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
    decoded = decode_rgb(data, "tensor")
    assert isinstance(decoded, torch.Tensor)
    np.testing.assert_array_equal(decoded.numpy(), expected)
    image = decode_rgb(data, "pil")
    assert isinstance(image, Image.Image)
    np.testing.assert_array_equal(np.asarray(image).transpose(2, 0, 1), expected)


def test_the_orientation_of_exif_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    data = encoded(photograph(), exif=exif)
    assert decode_rgb(data, "tensor").shape == (3, 75, 100)
    assert decode_rgb(data, "pil").size == (100, 75)


def written(folder: Path, contents: dict[str, bytes]) -> list[tuple[str, int]]:
    """Write files and return them as samples, labelled in their order."""
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return [(str(folder / name), label) for label, name in enumerate(contents)]


@pytest.mark.parametrize("augment", ["imagenet", "crop", "none"])
@pytest.mark.parametrize("seeded", [False, True])
def test_the_faster_decoder_crops_the_same_and_differs_by_rounding(augment, seeded, tmp_path):
    samples = written(tmp_path, {f"{n}.jpg": encoded(photograph(seed=n)) for n in range(12)})
    view = View(32, augment, (0.0, 0.0, 0.0), (1 / 255,) * 3)  # the values of the pixels
    seeds = np.arange(12) * 10**15 if seeded else None
    slow, fast = (
        FileImages(samples, view, decoder).fetch(Draw(np.arange(12), seeds)).batch.normalised()
        for decoder in DECODERS
    )
    difference = (slow.images - fast.images).abs()
    assert difference.max() <= 1.01
    assert difference.mean() < 0.02
    assert torch.equal(slow.labels, fast.labels)


def absurd(data: bytes) -> bytes:
    """Return a JPEG whose header claims 60,000 x 60,000 pixels."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + b"\xea\x60\xea\x60" + data[at + 4 :]


@pytest.mark.parametrize("decoder", DECODERS)
def test_broken_files_are_left_out_by_either_decoder(decoder, tmp_path):
    whole = encoded(photograph(), quality=95)
    samples = written(
        tmp_path,
        {
            "0.jpg": whole,
            "1.jpg": whole[: len(whole) // 2],
            "2.jpg": b"",
            "3.jpg": b"not an image",
            "4.jpg": whole[:12],
            "5.jpg": absurd(whole),
            "6.jpg": whole,
        },
    )
    samples.append((str(tmp_path / "absent.jpg"), 7))
    images = FileImages(samples, View(16, "none", MEAN, STD), decoder)
    batch, broken = images.fetch(Draw(np.arange(8), None))
    assert batch.labels.tolist() == [0, 6]
    assert batch.skipped == 6
    assert "1.jpg (" in broken
    assert "truncated" in broken
    for index, reason in [(3, "not an image"), (5, "3600000000 pixels"), (7, "No such file")]:
        with pytest.raises(DataError, match=rf"{index if index < 7 else 'absent'}.jpg.*{reason}"):
            images[index]
    (none, _) = images.fetch(Draw(np.array([1, 2]), None))
    assert none.normalised().images.shape == (0, 3, 16, 16)
    assert none.normalised().images.dtype == torch.float32


@pytest.mark.parametrize("decoder", DECODERS)
def test_damage_anywhere_in_a_file_never_stops_a_reader(decoder, tmp_path):
    rng = np.random.default_rng(1)
    whole = JPEGS["progressive"]
    contents = {}
    for number in range(60):
        data = np.frombuffer(whole, dtype=np.uint8).copy()
        data[rng.integers(0, len(data), 8)] = rng.integers(0, 256, 8)
        kept = len(data) if number % 2 else rng.integers(1, len(data))
        contents[f"{number}.jpg"] = data[:kept].tobytes()
    images = FileImages(written(tmp_path, contents), View(16, "none", MEAN, STD), decoder)
    batch, _ = images.fetch(Draw(np.arange(60), None))
    assert len(batch.images) + batch.skipped == 60
    assert 0 < batch.skipped < 60


def test_without_an_operator_for_jpeg_the_pixels_are_the_same(monkeypatch):
    def absent(*arguments: object) -> None:
        raise RuntimeError("decode_jpeg, jpeg.cpp:12, torchvision not compiled with libjpeg")

    assert has_jpeg_operator()
    expected = decode_rgb(JPEGS["colour"], "tensor")
    monkeypatch.setattr(torch.ops.image, "decode_jpeg", absent)
    has_jpeg_operator.cache_clear()
    try:
        assert not has_jpeg_operator()
        assert torch.equal(decode_rgb(JPEGS["colour"], "tensor"), expected)
    finally:
        has_jpeg_operator.cache_clear()


def test_files_travel_as_bytes_and_are_normalised_on_arrival(tmp_path):
    samples = written(tmp_path, {f"{n}.jpg": encoded(photograph(seed=n)) for n in range(3)})
    images = FileImages(samples, View(16, "imagenet", MEAN, STD))
    request = Draw(np.arange(3), np.arange(3))
    sent = images.fetch(request).batch
    assert sent.images.dtype == torch.uint8
    expected = functional.normalize(sent.images / 255, list(MEAN), list(STD))
    for workers in (0, 1):
        (batch,) = Reader(images, workers=workers).read([request])
        torch.testing.assert_close(batch.images, expected)
        assert batch.images.dtype == torch.float32
        (raw,) = Reader(images, workers=workers, for_gpu=True).read([request])
        assert torch.equal(raw.images, sent.images)
        assert torch.equal(raw.to("cpu")[0], batch.images)


class Halved(TensorImages):
    def fetch(self, request: Draw) -> Reply:
        batch, broken = super().fetch(request)
        batch = batch.normalised()
        return Reply(Batch(batch.images / 2, batch.labels, batch.skipped), broken)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_normalised_already_stays_as_it_is(workers):
    view = View(8, "none", (0.0,), (1.0,))
    images = Halved(torch.from_numpy(pixels(4, 1, 8, 8)), torch.arange(4), view)
    request = Draw(np.arange(4), None)
    for for_gpu in (False, True):
        (batch,) = Reader(images, workers=workers, for_gpu=for_gpu).read([request])
        assert torch.equal(batch.to("cpu")[0], images.fetch(request).batch.images)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches_hold_the_same(workers, tmp_path):
    samples = written(tmp_path, {f"{n}.jpg": encoded(photograph(seed=n)) for n in range(6)})
    images = FileImages(samples, View(16, "imagenet", MEAN, STD))
    requests = [Draw(np.arange(3) + 3 * n, np.arange(3)) for n in range(2)]
    reader = Reader(images, workers=workers, for_gpu=True)
    for _ in range(2):
        for batch, request in zip(reader.read(requests), requests, strict=True):
            assert batch.images.is_pinned()
            assert batch.labels.is_pinned()
            usual = images.fetch(request).batch.normalised().images
            assert torch.equal(batch.to("cuda")[0].cpu(), usual)


def test_page_locking_keeps_all_that_a_batch_says(monkeypatch):
    locked: list[torch.Tensor] = []

    def lock(tensor: torch.Tensor) -> torch.Tensor:
        locked.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", lock)
    scale = View(4, "none", MEAN, STD).scale
    batch = Batch(torch.from_numpy(pixels(2, 3, 4, 4)), torch.arange(2), 1, scale)
    found = batch.pin_memory()
    assert list(map(id, locked)) == [id(batch.images), id(batch.labels)]
    assert torch.equal(found.images, batch.images)
    assert torch.equal(found.labels, batch.labels)
    assert (found.skipped, found.scale) == (1, scale)


# ---- configuration -----------------------------------------------------------------------------


def test_the_configuration_chooses_decoder_and_prefetch(tmp_path, monkeypatch):
    for half in ("train", "val"):
        (tmp_path / half / "cat").mkdir(parents=True)
        for number in range(4):
            (tmp_path / half / "cat" / f"{number}.jpg").write_bytes(JPEGS["colour"])
    settings = DataConfig(
        dataset="imagefolder",
        root=tmp_path,
        image_size=16,
        batch_size=2,
        workers=2,
        prefetch=5,
        decoder="tensor",
    )
    data = load_data(settings)
    assert (data.train.decoder, data.val.decoder) == ("tensor", "tensor")
    made = []

    class Recorded(Reader):
        def __init__(self, images: ImageSet, **keys) -> None:
            made.append(keys)
            super().__init__(images, **keys)

    monkeypatch.setattr(compress.data.batches, "Reader", Recorded)
    batches = train_batches(data, RunConfig(data=settings), "cpu")
    assert made == [{"workers": 2, "prefetch": 5, "for_gpu": False}]
    first, second = list(batches.epoch(0)), list(batches.epoch(1))
    assert [len(batch.labels) for batch in first + second] == [2, 2, 2, 2]
    batches.close()
