"""The conformer: attention for what is far, convolution for what is near (Sec. 2.2, Fig. 1b).

Each block sends its input through four modules and adds what each gives: a feed-forward network (half
of what it gives), a convolution over time, self-attention, a second feed-forward network (half again).
Convolution stands before attention, unlike in the first conformer paper (Gulati et al. 2020): it tells
the steps apart by their neighbourhood, and so replaces the positional encoding, of which there is none.

Tensors are (B, L, D): batch, steps in time, width. `padding_mask` (B, L) is True at steps that only
fill up a batch; what a clip comes to is the same, whatever it is padded with.
"""
import torch
from torch import nn
from torch.nn import functional as F


class Dropout(nn.Dropout):
    """nn.Dropout, with its random numbers drawn four at a time on a CPU.

    There they are the largest single cost of a training step. A 64-bit random number holds four of
    16 bits, which is fine enough for a probability: 0.1 becomes 6554 / 65536. Compiled code is cut in two
    here (torch can't trace random_), and is still faster than with the compiler's own random numbers.
    """

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None)
        bits = bits.view(torch.int16)[:x.numel()].view(x.shape)
        keep = (bits >= round(self.p * 65536) - 32768).to(x.dtype)
        return x * keep.mul_(1 / (1 - self.p))


class FeedForward(nn.Module):
    """Two linear layers with SiLU between them, at each step by itself. (B, L, D) -> (B, L, D)."""

    def __init__(self, width, ffn, dropout):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, ffn)
        self.contract = nn.Linear(ffn, width)
        self.dropout = Dropout(dropout)

    def forward(self, x):
        x = self.dropout(F.silu(self.expand(self.norm(x))))
        return self.dropout(self.contract(x))


class ClipNorm(nn.Module):
    """Normalise over all of a clip: GroupNorm with one group, that leaves padding out.

    (B, L, D) -> (B, L, D), each clip to mean 0 and variance 1 over its steps and channels together,
    then a learned scale and shift per channel.
    """

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x, padding_mask=None):
        if padding_mask is None:
            return F.layer_norm(x, x.shape[1:]) * self.weight + self.bias
        valid = ~padding_mask[:, :, None]                           # (B, L, 1)
        count = valid.sum(1, keepdim=True) * x.shape[2]             # (B, 1, 1)
        x = x.float()                                               # sums are too large for bf16
        mean = (x * valid).sum((1, 2), keepdim=True) / count
        variance = ((x - mean) * valid).square().sum((1, 2), keepdim=True) / count
        return (x - mean) * torch.rsqrt(variance + 1e-5) * self.weight + self.bias


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over all steps of a batch that are not padding, as in the first conformer paper.

    (B, L, D) -> (B, L, D), 0 at padding.
    """

    def forward(self, x, padding_mask=None):
        if padding_mask is None:
            return super().forward(x.flatten(0, 1)).view_as(x)
        valid = ~padding_mask
        return torch.zeros_like(x).masked_scatter(valid[:, :, None], super().forward(x[valid]))


class Convolution(nn.Module):
    """Mixes each channel with its own neighbours in time. (B, L, D) -> (B, L, D).

    A linear layer with a gate (GLU), a convolution over `kernel` steps by channel ("depthwise"),
    normalisation, SiLU, a linear layer. Raises ValueError for a kernel that is not odd.
    """

    def __init__(self, width, kernel, dropout, norm="group"):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"the kernel of a convolution must be odd, not {kernel}")
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv2d(width, width, (1, kernel), padding=(0, kernel // 2),
                                   groups=width).to(memory_format=torch.channels_last)
        self.depthwise_norm = {"group": ClipNorm, "batch": BatchNorm}[norm](width)
        self.contract = nn.Linear(width, width)
        self.dropout = Dropout(dropout)

    def forward(self, x, padding_mask=None):
        x = F.glu(self.expand(self.norm(x)))
        if padding_mask is not None:                # padding must look like the void beyond the end
            x = x.masked_fill(padding_mask[:, :, None], 0)
        # A (B, L, D) tensor is a (B, D, 1, L) image whose channels come last in memory. Said so, the
        # convolution needs no copy, and is 2 to 3 times faster on a CPU than on a transposed one.
        x = self.depthwise(x.transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)
        x = F.silu(self.depthwise_norm(x, padding_mask))
        return self.dropout(self.contract(x))


class SelfAttention(nn.Module):
    """Each step gathers from all steps of its clip (Vaswani et al. 2017). (B, L, D) -> (B, L, D).

    Raises ValueError where the width does not divide by the number of heads.
    """

    def __init__(self, width, heads, dropout):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} does not divide by {heads} attention heads")
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.dropout = Dropout(dropout)

    def forward(self, x, padding_mask=None):
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2)         # (B, H, L, D / H)
                   for part in self.query_key_value(self.norm(x)).chunk(3, dim=2))
        attend = None if padding_mask is None else ~padding_mask[:, None, None, :]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attend,
                                           dropout_p=self.dropout.p if self.training else 0.0)
        return self.dropout(self.output(x.transpose(1, 2).flatten(2)))


class ConformerBlock(nn.Module):
    """One block of Fig. 1b: (x (B, L, D), padding_mask (B, L) or None) -> (B, L, D).

    width D; `heads` attention heads; `ffn` units in the feed-forward networks; `kernel` steps in
    the convolution; norm "group" or "batch", inside the convolution. Raises ValueError for a kernel that is
    not odd, and a width that does not divide by the heads.
    """

    def __init__(self, width, heads, ffn, kernel, dropout, norm="group"):
        super().__init__()
        self.feed_forward1 = FeedForward(width, ffn, dropout)
        self.convolution = Convolution(width, kernel, dropout, norm)
        self.attention = SelfAttention(width, heads, dropout)
        self.feed_forward2 = FeedForward(width, ffn, dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, x, padding_mask=None):
        x = x + 0.5 * self.feed_forward1(x)
        x = x + self.convolution(x, padding_mask)
        x = x + self.attention(x, padding_mask)
        x = x + 0.5 * self.feed_forward2(x)
        return self.norm(x)


class Conformer(nn.Module):
    """A stack of `blocks` blocks, the first with the kernel `first_kernel` (Sec. 2.2): (B, L, D) -> (B, L, D).

    The other arguments are those of `ConformerBlock`, which may raise ValueError.
    """

    def __init__(self, width, blocks, heads, ffn, first_kernel, kernel, dropout, norm="group"):
        super().__init__()
        self.blocks = nn.ModuleList(
            ConformerBlock(width, heads, ffn, kernel if i else first_kernel, dropout, norm)
            for i in range(blocks))

    def forward(self, x, padding_mask=None):
        for block in self.blocks:
            x = block(x, padding_mask)
        return x
