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
from projector import make_projector

IGNORE = -100  # a label that costs nothing
FORMAT_VERSION = 1  # of config.json beside a projector


class SpeechLLM(nn.Module):
    """Encode, project, splice into the LLM's input. Only `projector` trains, and LoRA if asked for: these are
    what `state_dict` holds.

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
        if config.get("lora_rank"):
            add_lora(llm, config["lora_rank"])
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
        lora = [name for name, weight in self.llm.named_parameters() if weight.requires_grad]
        llm = self.llm.state_dict(keep_vars=kwargs.get("keep_vars", False)) if lora else {}
        return self.projector.state_dict(*args, **kwargs) | {f"llm.{name}": llm[name] for name in lora}

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False):
        """Loads what `state_dict` gives, strictly even where the Trainer does not ask for it."""
        lora = {name: weight for name, weight in state_dict.items() if name.startswith("llm.")}
        if lora.keys() != {name for name in self.state_dict() if name.startswith("llm.")}:
            raise RuntimeError("not the LoRA of this model")
        self.llm.load_state_dict({name[4:]: weight for name, weight in lora.items()}, strict=False)
        projector = {name: weight for name, weight in state_dict.items() if name not in lora}
        return self.projector.load_state_dict(projector, strict=True, assign=assign)

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


def add_lora(llm: PreTrainedModel, rank: int) -> None:
    """Puts trainable matrices of that rank beside all Linears of the LLM but its head; alpha: 2 rank."""
    import peft  # only then

    lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    for weight in peft.inject_adapter_in_model(lora, llm).parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


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
