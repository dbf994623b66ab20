"""Speech in, text out: a frozen Whisper encoder, a trainable projector, a frozen causal LLM.

Legend: batch (utterances), frames (of mel, 100 a second), encoder_len (50 a second), speech_len (vectors for
the LLM), positions (prompt, speech and target in the LLM's input), n_mels, encoder_dim, llm_dim.
"""

import json
import os
from dataclasses import asdict
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from encoder import Encoder, encoder_len, real
from errors import Refused, refusing

IGNORE = -100  # a label that costs nothing
FORMAT_VERSION = 1  # of config.json beside a projector


class Conv1dProjector(nn.Module):
    """West's projector: Conv1d, ReLU, Linear, ReLU, Linear; stride 5 gives 10 vectors a second.

    The last stride is filled up with zeros, so that the end is heard and the shortest utterance has a vector.
    """

    def __init__(self, encoder_dim: int, llm_dim: int, stride: int, hidden_dim: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv1d(encoder_dim, encoder_dim, kernel_size=stride, stride=stride)
        self.linear1 = nn.Linear(encoder_dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, llm_dim)

    def speech_len(self, frames):
        """Vectors out of `frames` mel frames (int or Tensor)."""
        return -(-encoder_len(frames) // self.stride)

    def forward(self, encoded: Tensor, frames: Tensor) -> Tensor:
        """encoded (batch, encoder_len, encoder_dim), padded with 0 -> (batch, speech_len, llm_dim)."""
        encoded = F.pad(encoded.transpose(1, 2), (0, -encoded.shape[1] % self.stride))
        hidden = F.relu(self.conv(encoded)).transpose(1, 2)  # (batch, speech_len, encoder_dim)
        return self.linear2(F.relu(self.linear1(hidden)))


class BlspProjector(nn.Module):
    """BLSP's: three Conv1d of stride 2 with GLU, a residual bottleneck, LayerNorm; 6.25 vectors a second."""

    def __init__(self, encoder_dim: int, llm_dim: int):
        super().__init__()
        outs = [encoder_dim, encoder_dim, llm_dim]
        self.convs = nn.ModuleList(nn.Conv1d(encoder_dim, 2 * out, 5, stride=2, padding=2) for out in outs)
        self.down, self.up = nn.Linear(llm_dim, 512, bias=False), nn.Linear(512, llm_dim, bias=False)
        self.norm = nn.LayerNorm(llm_dim)

    def speech_len(self, frames):
        """Vectors out of `frames` mel frames (int or Tensor)."""
        return (encoder_len(frames) + 7) // 8

    def forward(self, encoded: Tensor, frames: Tensor) -> Tensor:
        """encoded (batch, encoder_len, encoder_dim), frames (batch,) -> (batch, speech_len, llm_dim)."""
        hidden, lens = encoded.transpose(1, 2), encoder_len(frames)
        for conv in self.convs:  # each sees zeros past an end, as if alone
            hidden = F.glu(conv(hidden * real(lens, hidden.shape[-1])[:, None]), dim=1)
            lens = (lens + 1) // 2
        hidden = hidden.transpose(1, 2)  # (batch, speech_len, llm_dim)
        return self.norm(hidden + self.up(F.gelu(self.down(hidden))))


def make_projector(projector_type: str, encoder_dim: int, llm_dim: int, stride=5, hidden_dim=2048):
    """A new projector: `conv1d` is West's, `blsp` BLSP's, without sizes of its own. Raises Refused else."""
    if projector_type == "conv1d" and min(stride, hidden_dim) > 0:
        return Conv1dProjector(encoder_dim, llm_dim, stride, hidden_dim)
    if projector_type == "blsp" and (stride, hidden_dim) == (5, 2048):
        return BlspProjector(encoder_dim, llm_dim)
    sizes = f"--projector_stride {stride} --projector_hidden_dim {hidden_dim}"
    raise Refused(f"no --projector_type {projector_type} of {sizes}: blsp takes none, conv1d such above 0")


class SpeechLLM(nn.Module):
    """Encode, project, splice into the LLM's input. Only `projector` trains; only it is in `state_dict`.

    config: as in config.json. Raises Refused if its encoder or its LLM has other sizes than these.
    """

    accepts_loss_kwargs = True  # so the Trainer hands over num_items_in_batch: one loss per token

    def __init__(self, encoder: Encoder, llm: PreTrainedModel, config: dict):
        super().__init__()
        for which, dims in fingerprint(encoder, llm).items():
            if dims != config.get(which):
                flags = "check --whisper_model_name_or_path and --llm_model_name_or_path"
                raise Refused(f"the projector was made for {which} {config.get(which)}, not {dims}: {flags}")
        self.encoder, self.llm = encoder.requires_grad_(False), llm.requires_grad_(False)
        llm.generation_config = GenerationConfig()  # Qwen's own brings a repetition penalty of 1.05 to 1.1
        dims = encoder.dims.n_audio_state, llm.get_input_embeddings().embedding_dim
        sizes = config["projector_stride"], config["projector_hidden_dim"]
        self.projector = make_projector(config["projector_type"], *dims, *sizes)
        self.window = config["encoder_window"]
        self.train(False)

    def train(self, mode: bool = True) -> "SpeechLLM":
        """Frozen parts stay in eval mode: no dropout. Only LLM layers that recompute are told the mode."""
        super().train(mode)
        self.encoder.eval()
        self.llm.eval()
        for layer in self.llm.modules():
            if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                layer.training = mode  # not its children; transformers recomputes nothing in eval mode
        return self

    def activation_checkpointing_enable(self, **kwargs) -> None:
        """Called by the Trainer: the LLM's activations are computed again in the backward pass."""
        name = "activation_checkpointing_enable"  # before transformers 5.23 it was gradient_...
        getattr(self.llm, name, self.llm.gradient_checkpointing_enable)(**kwargs)
        for module in self.llm.modules():  # OPT's layers, once told that they train, would drop out
            module.__dict__.update({name: 0.0 for name in vars(module) if name.endswith("dropout")})

    gradient_checkpointing_enable = activation_checkpointing_enable

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        return self.projector.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False):
        """Loads the projector, strictly even where the Trainer does not ask for it."""
        return self.projector.load_state_dict(state_dict, strict=True, assign=assign)

    @torch.no_grad()
    def encode(self, mel: Tensor, frames: Tensor) -> Tensor:
        """As Encoder.forward, without gradients; of a 30 s window only the real frames go on."""
        attended = torch.full_like(frames, mel.shape[-1]) if self.window == "30s" else frames
        encoded = self.encoder(mel.to(self.encoder.positional_embedding.dtype), attended)
        lens = encoder_len(frames)
        return (encoded * real(lens, encoded.shape[1])[..., None])[:, : int(lens.max())]

    def embed(self, input_ids: Tensor, speech_mask: Tensor, frames: Tensor, mel=None, encoded=None) -> Tensor:
        """The LLM's input, (batch, positions, llm_dim): text, and speech where `speech_mask` is True.

        mel: as `encode` takes it; or encoded: what that gave.
        """
        encoded = self.encode(mel, frames) if encoded is None else encoded
        encoded = encoded.to(next(self.projector.parameters()).dtype)
        speech = self.projector(encoded, frames)  # (batch, speech_len, llm_dim)
        embeddings = self.llm.get_input_embeddings()(input_ids).clone()
        heard = real(self.projector.speech_len(frames), speech.shape[1])
        embeddings[speech_mask] = speech[heard].to(embeddings.dtype)
        return embeddings

    def forward(self, labels, num_items_in_batch=None, where=None, faults=None, **speech_and_text):
        """{loss}: cross-entropy of the targets, summed, by `num_items_in_batch`, else by their number.

        labels (batch, positions) and what `embed` takes, padded right, where a causal LLM needs no mask;
        where, faults: of a batch, for messages, not for the LLM.
        """
        embeddings = self.embed(**speech_and_text)
        kept = (labels != IGNORE).any(0).nonzero().squeeze(1)  # positions with a label; none of the prompt
        logits = self.llm(inputs_embeds=embeddings, logits_to_keep=kept - 1, use_cache=False).logits
        labels = labels[:, kept].flatten()
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels, ignore_index=IGNORE, reduction="sum")
        targets = (labels != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": loss / targets}


def load_llm(name: str, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """A causal LLM of transformers, in its checkpoint's dtype unless told otherwise. Raises Refused."""
    errors = OSError, ValueError, SafetensorError, UnpicklingError
    with refusing(f"--llm_model_name_or_path {name}: not a causal LLM", *errors):
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False)


def fingerprint(encoder: Encoder, llm: PreTrainedModel) -> dict[str, dict]:
    """The sizes by which a projector knows its two backbones again."""
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    llm_dims = {name: getattr(llm.config.get_text_config(), name) for name in names}
    return {"encoder_dims": asdict(encoder.dims), "llm_dims": llm_dims}


def save_projector(folder: str, state_dict: dict[str, Tensor], config: dict) -> None:
    """Writes model.safetensors (the projector alone) and config.json (how to use it) into `folder`."""
    os.makedirs(folder, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    config_path, path = (os.path.join(folder, name) for name in ("config.json", "model.safetensors"))
    with open(config_path + ".new", "w", encoding="utf-8") as file:
        json.dump({"format_version": FORMAT_VERSION, **config}, file, ensure_ascii=False, indent=2)
    save_file(tensors, path + ".new", metadata={"format": "pt"})
    os.replace(file.name, config_path)
    os.replace(path + ".new", path)  # so that a killed save leaves what was there before


def load_config(path: str) -> tuple[str, dict]:
    """A model.safetensors, or its folder -> its path and the config.json beside it. Raises Refused."""
    path = os.path.join(path, "model.safetensors") if os.path.isdir(path) else path
    config_path = os.path.join(os.path.dirname(path), "config.json")
    with refusing(f"--projector_model_path {path}: needs its config.json", OSError, ValueError):
        with open(path, "rb"), open(config_path, encoding="utf-8") as file:
            config = json.load(file)
    if not isinstance(config, dict) or config.get("format_version") != FORMAT_VERSION:
        raise Refused(f"{config_path}: not of format_version {FORMAT_VERSION}, which this code reads")
    return path, config


def load_projector(model: SpeechLLM, *paths: str) -> None:
    """Puts the weights in `paths`, averaged, into the projector. Raises Refused unless they are its."""
    states = []
    for path in paths:
        with refusing(f"{path}: not what its config.json says", SafetensorError, RuntimeError):
            states.append(load_file(path))
            model.load_state_dict(states[-1])
    model.load_state_dict({name: sum(state[name] for state in states) / len(states) for name in states[0]})
