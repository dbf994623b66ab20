"""Encoder features on disk: what the frozen encoder hears is computed once, for all epochs and runs."""

import hashlib
import json
import os

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from dataset import SpeechDataset, collate
from encoder import Encoder, encoder_len
from errors import Refused, refusing
from manifest import Utterance, read_audio
from model import SpeechLLM


def weights_hash(encoder: Encoder) -> str:
    """sha256 of the weights: two encoders of the same sizes are told apart. A second for each GB."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class FeatureCache:
    """A folder with a file for each recording, named by its path, size, time of change and part.

    cache.json in it says which encoder, window and dtype they are of. Raises Refused where that is another.
    """

    def __init__(self, folder: str, encoder: Encoder, window: str, dtype: torch.dtype):
        self.folder, self.dtype = folder, dtype
        settings = {"encoder": weights_hash(encoder), "window": window, "dtype": str(dtype)}
        path = os.path.join(folder, "cache.json")
        with refusing(f"--feature_cache {folder}", OSError, ValueError):
            os.makedirs(folder, exist_ok=True)
            if not os.path.exists(path):
                with open(f"{path}.{os.getpid()}", "w", encoding="utf-8") as file:
                    json.dump(settings, file)
                os.replace(file.name, path)
            with open(path, encoding="utf-8") as file:
                found = dict(json.load(file))
        if found != settings:
            other = ", ".join(name for name in settings if found.get(name) != settings[name])
            raise Refused(f"--feature_cache {folder}: made with another {other}; give each its own folder")

    def path(self, utterance: Utterance) -> str:
        """Where its features are, or will be. Raises Refused if there is no audio."""
        with refusing(utterance.where, OSError):
            stat = os.stat(utterance.path)
        part = [utterance.record.get(name) for name in ("start", "duration")]
        known = f"{os.path.realpath(utterance.path)} {stat.st_size} {stat.st_mtime_ns} {part}"
        name = hashlib.sha256(known.encode(errors="surrogateescape")).hexdigest()
        return os.path.join(self.folder, name[:2], f"{name}.safetensors")

    def load(self, utterance: Utterance) -> dict[str, Tensor]:
        """encoded (encoder_len, encoder_dim), frames (). Raises Refused if it could not be computed."""
        path = self.path(utterance)
        if not os.path.exists(path):
            read_audio(utterance)  # raises, mostly, and says why
        with refusing(f"{utterance.where}: {path}", OSError, SafetensorError):
            return load_file(path)

    def fill(self, model: SpeechLLM, dataset: SpeechDataset, batches: list, workers: int, device="cpu"):
        """Gives `dataset` its features, and computes what it lacks of these batches (arrays of indices).

        Killed, it leaves whole files, or none.
        """
        dataset.features = self
        model.encoder.to(device)
        loader = torch.utils.data.DataLoader(
            Missing(self, dataset), batch_sampler=batches, collate_fn=list, num_workers=workers
        )
        device = torch.device(device)
        for items in tqdm(loader, desc="encoding", disable=None):
            if items := [item for item in items if item]:
                batch = collate([heard for _, heard in items])
                with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                    encoded = model.encode(batch["mel"].to(device), batch["frames"].to(device))
                for (path, heard), vectors in zip(items, encoded.to(self.dtype).cpu()):
                    vectors = vectors[: encoder_len(heard["frames"])].contiguous()
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    save_file({"encoded": vectors, "frames": heard["frames"]}, f"{path}.{os.getpid()}")
                    os.replace(f"{path}.{os.getpid()}", path)
        if torch.distributed.is_initialized():  # each needs what the others wrote
            torch.distributed.barrier()


class Missing(torch.utils.data.Dataset):
    """Of each utterance (path of its features, its mel and frames), or None where they are there."""

    def __init__(self, cache: FeatureCache, dataset: SpeechDataset):
        self.cache, self.dataset = cache, dataset

    def __getitem__(self, index: int) -> tuple[str, dict[str, Tensor]] | None:
        try:
            utterance = self.dataset.utterances[index]
            path = self.cache.path(utterance)
            if not os.path.exists(path):
                return path, self.dataset.hear(utterance, read_audio(utterance))
        except Refused:  # training will come upon it, and say so
            pass
        return None
