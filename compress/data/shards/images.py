"""Images in tar shards as an image set."""

from __future__ import annotations

import numpy as np
import torch

from compress.data.decoding import Decoded, Decoder, decode_rgb
from compress.data.loading import Draw, EncodedImages, Reply
from compress.data.order import Int64s, Share, fetched_ahead, streamed
from compress.data.shards.index import ShardIndex
from compress.data.shards.store import Store
from compress.data.views import View


class ShardImages(EncodedImages):
    """Images that are read from tar shards, a range of bytes each.

    Args:
        store: Where the shards lie.
        index: Which images they hold.
        view: How the images become what the network sees.
        decoder: What decodes them, see ``compress.data.decoding``.
        window: Shards whose images are mixed in training.
    """

    def __init__(
        self,
        store: Store,
        index: ShardIndex,
        view: View,
        decoder: Decoder = "pil",
        window: int = 8,
    ) -> None:
        super().__init__(torch.from_numpy(index.labels), view, decoder)
        self.store, self.index, self.window = store, index, window

    def epoch_order(self, share: Share, rng: np.random.Generator) -> Int64s:
        """Return the positions that one rank trains on, from a few shards at a time."""
        return streamed(self.index.first, self.window, share, rng)

    def ahead(self, order: Int64s) -> list[tuple[int, ...]]:
        """Return which shards to fetch during each step, if the store keeps them until then."""
        # Those just read, those that are being read, and those to come.
        windows = np.sort(self.index.shard_bytes)[-3 * self.window :]
        if not self.store.keeps(int(windows.sum())):
            return super().ahead(order)
        return fetched_ahead(self.index.shards_of(order), self.window)

    def fetch(self, request: Draw) -> Reply:
        """Read a batch, while the shards for later ones are fetched."""
        for shard in request.ahead:
            self.store.fetch_ahead(self.index.shards[shard], int(self.index.shard_bytes[shard]))
        return super().fetch(request)

    def name_of(self, index: int) -> str:
        """Return the names of an image and of its shard."""
        name = self.index.name_of(index).decode("utf-8", "backslashreplace")
        return f"{name} in {self.index.shards[self.index.shard_of(index)]}"

    def decoded(self, index: int) -> Decoded:
        """Read and decode one image.

        Raises:
            DECODE_ERRORS: the image is damaged.
            DataError: its shard is gone, has changed or cannot be fetched.
        """
        shard = self.index.shard_of(index)
        size, offset = int(self.index.sizes[index]), int(self.index.offsets[index])
        name, length = self.index.shards[shard], int(self.index.shard_bytes[shard])
        with self.store.opened(name, length) as stream:
            stream.seek(offset)
            data = stream.read(size)
        if len(data) < size:
            raise OSError("the shard is cut short")
        return decode_rgb(data, self.decoder)
