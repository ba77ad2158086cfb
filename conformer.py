"""The conformer: attention for what is far, convolution for what is near (Sec. 2.2, Fig. 1b).

Each block has four modules and adds each module's output to its input: a feed-forward network, a
convolution over time, self-attention, and a second feed-forward network; the outputs of the two
feed-forward networks are halved. Convolution comes before attention, unlike in the original conformer
(Gulati et al. 2020): it tells the steps apart by their neighbours, which replaces positional encoding.

Tensors are (B, L, D): batch, latents in time, width. `padding_mask` (B, L) is True at steps that only
fill up a batch; a clip gives the same output alone and padded (but for BatchNorm in training).
"""
import math

import torch
from torch import nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """Two linear layers with SiLU between them, at each step by itself. (B, L, D) -> (B, L, D)."""

    def __init__(self, dim, ffn_dim, dropout):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, ffn_dim)
        self.down = nn.Linear(ffn_dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x):
        x = self.dropout(F.silu(self.up(self.norm(x))))
        return self.dropout(self.down(x))


class MaskedGroupNorm(nn.Module):
    """GroupNorm with one group, that is, over all steps and channels of a clip, leaving padding out.

    (B, L, D) -> (B, L, D), each clip to mean 0 and variance 1, then a learned scale and shift per channel.
    """

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x, padding_mask=None):
        if padding_mask is None:
            return F.layer_norm(x, x.shape[1:]) * self.weight + self.bias
        x = x.masked_fill(padding_mask[:, :, None], 0)
        count = (~padding_mask).sum(1)[:, None, None] * x.shape[2]                  # (B, 1, 1)
        mean = x.sum((1, 2), keepdim=True, dtype=torch.float32) / count             # too large a sum for bf16
        # The mean is a fraction of the deviation here, so that little cancels.
        variance = (x * x).sum((1, 2), keepdim=True, dtype=torch.float32) / count - mean.square()
        scale = torch.rsqrt(variance.clamp(min=0) + 1e-5) * self.weight             # (B, 1, D)
        return torch.addcmul((self.bias - mean * scale).to(x.dtype), x, scale.to(x.dtype))


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over all steps of a batch that are not padding, as in the first conformer paper.

    (B, L, D) -> (B, L, D), 0 at padding.
    """

    def forward(self, x, padding_mask=None):
        if padding_mask is None:
            return super().forward(x.flatten(0, 1)).view_as(x)
        valid = ~padding_mask
        return torch.zeros_like(x).masked_scatter(valid[:, :, None], super().forward(x[valid]))


NORMS = dict(group=MaskedGroupNorm, batch=BatchNorm)        # in the convolution


class Convolution(nn.Module):
    """Mix each channel with its own neighbours in time. (B, L, D) -> (B, L, D).

    A linear layer with a gate (GLU), a convolution over `kernel` steps by channel ("depthwise"),
    normalisation, SiLU, a linear layer. Raises ValueError for a kernel that is not odd.
    """

    def __init__(self, dim, kernel, dropout, norm="group"):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"the kernel of a convolution must be odd, not {kernel}")
        self.norm = nn.LayerNorm(dim)
        self.pointwise1 = nn.Linear(dim, 2 * dim)
        self.depthwise = DepthwiseConvolution(dim, kernel)
        self.depthwise_norm = NORMS[norm](dim)
        self.pointwise2 = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x, padding_mask=None):
        x = F.glu(self.pointwise1(self.norm(x)))
        if padding_mask is not None:                # like the zero padding at the clip's edge
            x = x.masked_fill(padding_mask[:, :, None], 0)
        x = self.depthwise(x)
        x = F.silu(self.depthwise_norm(x, padding_mask))
        return self.dropout(self.pointwise2(x))


class SelfAttention(nn.Module):
    """Each step gathers from all steps of its clip (Vaswani et al. 2017). (B, L, D) -> (B, L, D).

    Raises ValueError where the width is not a multiple of the number of heads.
    """

    def __init__(self, dim, heads, dropout):
        super().__init__()
        if dim % heads:
            raise ValueError(f"a width of {dim} is not a multiple of {heads} attention heads")
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x, padding_mask=None):
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2)         # (B, H, L, D / H)
                   for part in self.query_key_value(self.norm(x)).chunk(3, dim=2))
        visible = None if padding_mask is None else ~padding_mask[:, None, None, :]
        x = attend(q, k, v, visible, self.dropout)
        return self.dropout(self.output(x.transpose(1, 2).flatten(2)))


class ConformerBlock(nn.Module):
    """One block of Fig. 1b: (x (B, L, D), padding_mask (B, L) or None) -> (B, L, D).

    dim: the width D; `heads` attention heads; `ffn_dim` units in the feed-forward networks; `kernel` steps in
    the convolution; norm "group" or "batch", inside the convolution. Raises ValueError for a kernel that is
    not odd, and a width that is not a multiple of the heads.
    """

    def __init__(self, dim, heads, ffn_dim, kernel, dropout, norm="group"):
        super().__init__()
        self.feed_forward1 = FeedForward(dim, ffn_dim, dropout)
        self.convolution = Convolution(dim, kernel, dropout, norm)
        self.attention = SelfAttention(dim, heads, dropout)
        self.feed_forward2 = FeedForward(dim, ffn_dim, dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x, padding_mask=None):
        x = x + 0.5 * self.feed_forward1(x)
        x = x + self.convolution(x, padding_mask)
        x = x + self.attention(x, padding_mask)
        x = x + 0.5 * self.feed_forward2(x)
        return self.norm(x)


class Conformer(nn.Module):
    """A stack of `blocks` blocks, the first with the kernel `first_kernel` (Sec. 2.2).

    The other arguments are those of `ConformerBlock`, which may raise ValueError.
    """

    def __init__(self, dim, blocks, heads, ffn_dim, first_kernel, kernel, dropout, norm="group"):
        super().__init__()
        self.blocks = nn.ModuleList(
            ConformerBlock(dim, heads, ffn_dim, kernel if i else first_kernel, dropout, norm)
            for i in range(blocks))

    def forward(self, x, padding_mask=None, layer=None):
        """x (B, L, D), padding_mask (B, L) or None -> (B, L, D), after the first `layer` blocks (None: all)."""
        x = x.float()       # the residual stream: CUDA's autocast keeps it in float32, a CPU's would not
        for block in self.blocks[:layer]:
            x = block(x, padding_mask)
        return x


# ------------------------------------------------------------------------------ what only makes it faster

# On Hopper, torch 2.11 and later prefer cuDNN's attention, which rounds the share that dropout drops (pytorch#174245)
# and plans anew for every shape.
torch.backends.cuda.enable_cudnn_sdp(False)


class Dropout(nn.Dropout):
    """nn.Dropout, with its random numbers drawn four at a time on a CPU.

    A 64-bit random number holds four of 16 bits, which is fine enough for a probability: 0.1 becomes
    6554 / 65536. On one core this saves 7% of a training step of `small` and 12% of `tiny` in float32.
    """

    def draws(self, x):
        """Whether numbers for x are drawn here, and not by torch."""
        return self.training and self.p > 0 and x.device.type == "cpu" and not torch.compiler.is_compiling()

    def forward(self, x):
        if not self.draws(x):
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None)
        bits = bits.view(torch.int16)[:x.numel()].view(x.shape)
        keep = (bits >= round(self.p * 65536) - 32768).to(x.dtype)
        return x * keep.mul_(1 / (1 - self.p))


def attend(q, k, v, visible, dropout):
    """Softmax attention that drops some of its weights: q, k, v (B, H, L, D / H) -> (B, H, L, D / H).

    visible (B, 1, 1, L) is False at padding; None: all steps. It is written out where our Dropout draws its own
    numbers: on one core this saves 7% of a training step of `tiny`, 15% in bfloat16.
    """
    if not dropout.draws(q):
        return F.scaled_dot_product_attention(q, k, v, visible, dropout.p if dropout.training else 0.0)
    weights = q @ k.mT / math.sqrt(q.shape[3])                                                  # (B, H, L, L)
    if visible is not None:
        weights = weights.masked_fill(~visible, -torch.inf)
    return dropout(weights.softmax(3)) @ v


class DepthwiseConvolution(nn.Conv1d):
    """nn.Conv1d of each channel with a kernel of its own, on (B, L, D) -> (B, L, D), in the form that is fastest.

    Compiled, a sum of shifted copies becomes one pass over memory, and so does each of its gradients. A CPU takes x
    as it lies in memory, as an image (B, D, 1, L) whose channels come last: no copy, and 2 to 3 times faster. CUDA
    takes channels first: the other way was 1.7 times as fast on an H200, but others saw it five times as slow
    (pytorch#175280).
    """

    def __init__(self, dim, kernel):
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x):
        (L, D), K = x.shape[1:], self.kernel_size[0]
        if torch.compiler.is_compiling():
            padded, weight = F.pad(x, (0, 0, K // 2, K // 2)), self.weight[:, 0]                # (D, K)
            return sum((padded[:, k:k + L] * weight[:, k] for k in range(K)), self.bias).to(x.dtype)
        x = x.transpose(1, 2)                                                                   # (B, D, L)
        if x.is_cuda:
            return super().forward(x).transpose(1, 2)           # which copies x
        x = F.conv2d(x[:, :, None], self.weight[:, :, None], self.bias, padding=(0, K // 2), groups=D)
        return x[:, :, 0].transpose(1, 2)
