"""The projectors: encoder vectors -> fewer vectors of the LLM's width."""

import torch.nn.functional as F
from torch import Tensor, nn

from encoder import encoder_len, real
from errors import Refused


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
