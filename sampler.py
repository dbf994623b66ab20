"""Which utterances make a batch: those of like length, so that little of it is padding."""

import numpy as np
import torch

from dataset import SpeechDataset


class LengthSampler(torch.utils.data.Sampler):
    """Indices, each `step` of them of utterances of like length, in an order set by seed and epoch.

    Shuffled, cut into pools of 50 steps; a pool is sorted, cut into steps, and its steps are shuffled.
    """

    def __init__(self, dataset: SpeechDataset, step: int, seed: int):
        self.dataset, self.step, self.seed = dataset, step, seed

    def __len__(self) -> int:
        return len(self.dataset.utterances)

    def __iter__(self):
        random = np.random.default_rng((self.seed, self.dataset.epoch))
        order = np.arange(len(self), dtype=np.int32)  # in place, and no more: there may be 10^7
        random.shuffle(order)
        for start in range(0, len(order), 50 * self.step):
            pool = order[start : start + 50 * self.step]
            pool = pool[np.argsort(self.dataset.utterances.seconds_of(pool), kind="stable")]
            whole = len(pool) // self.step  # a last step that is not full stays last
            for i in [*random.permutation(whole), whole]:
                yield from pool[i * self.step : (i + 1) * self.step].tolist()


class SecondsSampler(torch.utils.data.Sampler):
    """Batches `by_seconds`, as lists of indices, in an order set by seed and epoch; as many in each epoch.

    Utterances of one length, in steps of 0.1 s, change places.
    """

    def __init__(self, dataset: SpeechDataset, most: float, seed: int):
        self.dataset, self.seed = dataset, seed
        self.seconds = np.ceil(dataset.utterances.seconds * 10) / 10
        self.sizes = [len(batch) for batch in by_seconds(self.seconds, most)]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self):
        random = np.random.default_rng((self.seed, self.dataset.epoch))
        order = random.permutation(len(self.seconds))
        order = order[np.argsort(-self.seconds[order], kind="stable")]
        batches = np.split(order, np.cumsum(self.sizes)[:-1])
        for i in random.permutation(len(batches)):
            yield batches[i].tolist()


def by_seconds(seconds: np.ndarray, most: float, count: int | None = None) -> list[np.ndarray]:
    """Indices, the longest first, in batches that with their padding take at most `most` seconds, or of one.

    count: the most in a batch.
    """
    order, batches = np.argsort(-seconds, kind="stable"), []
    while len(order):
        fit = max(1, int(most // max(seconds[order[0]], 0.1)))
        batch, order = np.split(order, [min(fit, count or fit)])
        batches.append(batch)
    return batches
