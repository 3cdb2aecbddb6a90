"""The processes that decode images, and what they send.

A reader keeps its workers from epoch to epoch. They live for the process that reads and end with
it: a Ctrl-C in a terminal and a SIGTERM to a whole job reach every process, and only the one that
trains decides what they mean.
"""

from __future__ import annotations

import copy
import functools
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess

import torch
from torch.utils.data import DataLoader, Dataset

from compress.data.loading import Batch, Draw, ImageSet, Reply
from compress.errors import CompressError, DataError

PREFETCH = 2
"""Batches that each worker reads ahead unless the configuration says otherwise."""


class Reader:
    """Reads batches of one image set; its workers start with the first and stay for the next.

    Args:
        images: The image set.
        workers: Processes that decode; 0 decodes in this process.
        prefetch: Batches that each worker reads ahead.
        for_gpu: Leave images to ``Batch.to`` to be normalised on the GPU; where there is one they
            are returned in page-locked memory.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        workers: int = 0,
        prefetch: int = PREFETCH,
        for_gpu: bool = False,
    ) -> None:
        self._images, self._workers, self._prefetch = images, workers, prefetch
        self._for_gpu = for_gpu
        # Without a GPU torch would warn, and there is nothing to pin memory for.
        self._pin_memory = for_gpu and torch.cuda.is_available()
        self._asked = _Asked()
        self._loader: _Loader | None = None
        self._started: list[BaseProcess] = []
        self._busy = False

    def read(self, requests: Iterable[Draw]) -> Iterator[Batch]:
        """Yield the batch of every request, in order.

        Whoever stops in the middle leaves nothing behind for the next call.

        Raises:
            DataError: a worker process died, or none could be started.
        """
        if not self._workers:
            yield from map(self._told, self._read_here(requests))
        elif self._busy:  # two epochs at once: each has workers of its own
            other = Reader(
                self._images,
                workers=self._workers,
                prefetch=self._prefetch,
                for_gpu=self._for_gpu,
            )
            yield from other.read(requests)
        else:
            self._busy = True
            try:
                yield from map(self._told, self._receive(requests))
            finally:
                self._busy = False

    def close(self) -> None:
        """End the workers; a later call of ``read`` starts others."""
        self._loader = None
        self._started.clear()

    def _read_here(self, requests: Iterable[Draw]) -> Iterator[Reply]:
        for request in requests:
            batch, broken = self._images.fetch(request)
            yield Reply(batch.pin_memory() if self._pin_memory else batch, broken)

    def _receive(self, requests: Iterable[Draw]) -> Iterator[Reply]:
        self._asked.requests = requests
        replies = None
        try:
            replies = self._begun()
            while True:
                if _any_died(self._started):
                    raise self._death()
                reply = next(replies, None)
                if reply is None:
                    return
                if isinstance(reply, CompressError):  # a worker met it
                    raise reply
                yield reply
        except GeneratorExit:
            raise
        except BaseException as error:
            # The others would go on to decode for nobody. They are told so while their queues live:
            # collected later, with the traceback, each would be waited for.
            replies = None
            traceback.clear_frames(error.__traceback__)
            self.close()
            if _tells_of_death(error):
                raise self._death() from error
            raise

    def _begun(self) -> Iterator[Reply | CompressError]:
        """Begin an epoch, with the workers of the last one if there was one."""
        if self._loader is not None:
            if _any_died(self._started):
                raise self._death()
            return iter(self._loader)
        self._loader = _Loader(
            _Replies(self._images),
            sampler=self._asked,
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=self._prefetch,
            persistent_workers=True,
            pin_memory=self._pin_memory,
            worker_init_fn=_prepare_worker,
            multiprocessing_context=_context(),
            # A generator of its own: the loader would draw from the global one.
            generator=torch.Generator(),
        )
        before = set(multiprocessing.active_children())
        try:
            with _unsignalled(), _quiet_deaths():
                replies = iter(self._loader)
        except OSError as error:
            raise DataError(
                f"the {self._workers} processes that decode images cannot be started "
                f"({error.strerror or error}): lower data.workers, or set it to 0"
            ) from error
        self._started[:] = set(multiprocessing.active_children()) - before
        return replies

    def _death(self) -> DataError:
        return DataError(
            f"one of the {self._workers} processes that decode images died, most often for want "
            "of memory or of space in /dev/shm: lower data.workers, or set it to 0"
        )

    def _told(self, reply: Reply) -> Batch:
        if reply.broken:
            self._images.report(reply.broken)
        return reply.batch if self._for_gpu else reply.batch.normalised()


def batches(
    images: ImageSet,
    requests: Iterable[Draw],
    *,
    workers: int,
    for_gpu: bool = False,
    prefetch: int = PREFETCH,
) -> Iterator[Batch]:
    """Yield the batch of every request, in order, by workers that end with the last one.

    Raises:
        DataError: a worker process died, or none could be started.
    """
    reader = Reader(images, workers=workers, prefetch=prefetch, for_gpu=for_gpu)
    yield from reader.read(requests)


class _Loader(DataLoader[Reply | CompressError]):
    def check_worker_number_rationality(self) -> None:
        """Do not warn of more workers than cores: slow storage wants them, and they were set."""


class _Asked:
    """What a loader takes for its sampler: the requests of the epoch that begins."""

    requests: Iterable[Draw] = ()

    def __iter__(self) -> Iterator[Draw]:
        return iter(self.requests)


class _Replies(Dataset[Reply | CompressError]):
    """The view that a DataLoader has of an image set: requests in, replies out."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __getitem__(self, request: Draw) -> Reply | CompressError:
        try:
            return self.images.fetch(request)
        except CompressError as error:  # torch would bury its sentence in a traceback
            return error


# ---- deaths ------------------------------------------------------------------------------------


class _Flag:
    """What a loader uses of a multiprocessing.Event, without the lock of one.

    Workers look at the flag before every batch: one that was killed just then would keep the lock,
    and the reader that ends the workers would wait for it for ever.
    """

    def __init__(self, context: BaseContext) -> None:
        self._value = context.RawValue("b", 0)

    def set(self) -> None:
        self._value.value = 1

    def is_set(self) -> bool:
        return bool(self._value.value)


def _context() -> BaseContext:
    """Return Python's way of starting processes, with events that survive a kill."""
    context = copy.copy(multiprocessing.get_context())
    context.Event = functools.partial(_Flag, context)  # type: ignore[assignment,method-assign]
    return context


def _tells_of_death(error: BaseException) -> bool:
    """Tell a dead worker from an exception that a worker has met and sent."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in str(error)
    # A batch whose worker died after sending it cannot be fetched from it any more.
    return isinstance(
        error, ConnectionError | EOFError | FileNotFoundError
    ) and "in DataLoader worker process" not in str(error)


def _any_died(workers: list[BaseProcess]) -> bool:
    return any(worker.exitcode not in (None, 0) for worker in workers)


# ---- signals -----------------------------------------------------------------------------------

_STOP = {signal.SIGINT, signal.SIGTERM}


@contextmanager
def _unsignalled() -> Iterator[None]:
    """Let new workers begin deaf: until they are prepared they have this process's handlers."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare_worker(number: int) -> None:
    """Leave Ctrl-C and SIGTERM to the process that reads; a SIGTERM of its own ends a worker.

    Torch has limited the worker to one thread already.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reader = multiprocessing.parent_process()
    if reader is not None and hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_obey, args=(reader.pid,), daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _obey(reader: int) -> None:
    """End this process when a SIGTERM comes from ``reader``; SLURM's comes from elsewhere."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != reader:
        pass
    os._exit(0)


@contextmanager
def _quiet_deaths() -> Iterator[None]:
    """Keep torch from raising at a worker's death wherever this process is just then.

    Its handler would break into a training step. Without it torch looks every few seconds while a
    batch is awaited, and the reader before it asks for one.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
