"""Whisper's encoder over utterances of any lengths."""

import torch
import torch.nn.functional as F
import whisper
from torch import Tensor, nn

from errors import refusing


def encoder_len(frames):
    """Encoder vectors out of mel frames (int or Tensor): Whisper's second convolution has stride 2."""
    return (frames + 1) // 2


def real(lens: Tensor, size: int) -> Tensor:
    """Lengths (batch,) -> (batch, size) bool, False where only padding stands."""
    return torch.arange(size, device=lens.device) < lens[:, None]


class Encoder(whisper.model.AudioEncoder):
    """Whisper's encoder over utterances of any lengths, masked, so that none is changed by its neighbours.

    openai-whisper's forward insists on 3000 frames, its SDPA takes any mask for a causal one, its LayerNorm
    fails in bf16: so attention is spelled out here, over torch's LayerNorm. At 3000 frames both are equal.
    """

    def __init__(self, dims: whisper.model.ModelDimensions):
        width = dims.n_audio_state
        super().__init__(dims.n_mels, dims.n_audio_ctx, width, dims.n_audio_head, dims.n_audio_layer)
        for block in self.blocks:
            block.attn_ln, block.mlp_ln = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ln_post, self.dims = nn.LayerNorm(width), dims

    def forward(self, mel: Tensor, frames: Tensor) -> Tensor:
        """mel (batch, n_mels, frames), frames (batch,) -> (batch, encoder_len, encoder_dim), 0 past ends."""
        inside = real(frames, mel.shape[-1])[:, None]  # both convolutions see zeros past an end, as if alone
        hidden = F.gelu(self.conv1(mel * inside)) * inside  # (batch, encoder_dim, frames)
        hidden = F.gelu(self.conv2(hidden)).transpose(1, 2)  # (batch, encoder_len, encoder_dim)
        hidden = hidden + self.positional_embedding[: hidden.shape[1]].to(hidden.dtype)
        heard = real(encoder_len(frames), hidden.shape[1])  # (batch, encoder_len)
        for block in self.blocks:
            hidden = hidden + self.attend(block.attn, block.attn_ln(hidden), heard[:, None, None])
            hidden = hidden + block.mlp(block.mlp_ln(hidden))
        return self.ln_post(hidden) * heard[..., None]

    @staticmethod
    def attend(attn: whisper.model.MultiHeadAttention, hidden: Tensor, heard: Tensor) -> Tensor:
        projected = (attn.query(hidden), attn.key(hidden), attn.value(hidden))
        query, key, value = (heads.unflatten(-1, (attn.n_head, -1)).transpose(1, 2) for heads in projected)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=heard)
        return attn.out(attended.transpose(1, 2).flatten(2))


def load_encoder(name: str) -> Encoder:
    """The encoder of an openai-whisper name or file, in float32, on the CPU. Raises Refused."""
    with refusing(f"--whisper_model_name_or_path {name}: not a Whisper model", Exception):
        model = whisper.load_model(name, device="cpu")  # raises many types, all of one meaning
    encoder = Encoder(model.dims)
    encoder.load_state_dict(model.encoder.state_dict())
    return encoder
