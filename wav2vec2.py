"""wav2vec 2.0 on log-mels: learn sound by guessing what was masked (Sec. 2.2, Fig. 1a and 1c).

A feature encoder turns each 80 ms of log-mels into a latent vector z. Some spans of latents are
masked, a conformer reads the rest, and at each masked step its output, the context c, has to tell
the latent that was there from distractors: latents of other masked steps of the same clip. What it
must know to win, about how sound goes on, is what fine-tuning starts from.

    python wav2vec2.py     prints the sizes beside the paper's

Tensors are (B, L, D): batch, latents in time (12.5 a second), width. C is the width of a latent.
"""
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from conformer import Conformer
from frontend import MELS

SIZES = {
    "tiny": dict(width=128, blocks=4, heads=4, ffn=512),                # for a laptop
    "small": dict(width=256, blocks=12, heads=8, ffn=1024),             # cf S
    "large": dict(width=768, blocks=12, heads=12, ffn=1024),            # cf L
}
# mask, span and distractors are mask_prob, mask_length and num_negatives in wav2vec 2.0's own code.
COMMON = dict(
    first_kernel=31, kernel=15, dropout=0.1, norm="group",
    stack=4,            # R: log-mel frames in a latent
    latent=256,         # C: width of a latent
    mask=0.3,           # share of the latents that are masked
    span=3,             # masked latents in a row: 240 ms
    distractors=100,    # K
    temperature=0.1,    # divides the similarities of Eq. 1, as in wav2vec 2.0
)


class Pretraining(NamedTuple):
    """What `Wav2Vec2` returns: the loss of Eq. 1 and how healthy the training is (all scalars).

    An accuracy that stays at chance, a spread that goes to 0 or a cosine that goes to 1 say that
    the latents have collapsed into one.
    """
    loss: torch.Tensor              # mean over the masked steps that count, in nats
    count: torch.Tensor             # masked steps that count
    accuracy: torch.Tensor          # share of them whose own latent scores above all distractors
    chance: torch.Tensor            # the accuracy of a blind guess
    masked: torch.Tensor            # share of the steps that are masked
    latent_std: torch.Tensor        # of the masked latents: standard deviation over time
    latent_cosine: torch.Tensor     # of the same: mean cosine between two of different steps of a clip
    duplicates: torch.Tensor        # share of distractors that equal the latent to be found
    dropped: torch.Tensor           # masked steps without one distractor left, not counted


def diagnosis(figures):
    """What is wrong with a pre-training of these figures (of `Pretraining`, as numbers), in words; or None."""
    if figures["latent_std"] < 0.01 or figures["latent_cosine"] > 0.99:
        return (f"the latents of a clip are nearly all alike (cosine {figures['latent_cosine']:.3f}, spread "
                f"{figures['latent_std']:.3f}): collapsed, or the data are silence. Lower --lr, warm up longer, "
                "look at the data")
    if figures["duplicates"] > 0.5:
        return (f"{figures['duplicates']:.0%} of the distractors equal what is to be found: silence or loops "
                "in the data teach nothing")
    return None


class FeatureEncoder(nn.Module):
    """Log-mels to latents z: stack R frames, one linear layer, LayerNorm (Sec. 2.2).

    log_mel (B, T, 64), padding_mask (B, T) or None -> z (B, L, C) and its padding mask (B, L) or
    None, with L = ceil(T / R). What is missing from a last latent is 0, a band's mean.
    """

    def __init__(self, stack, latent):
        super().__init__()
        self.stack = stack
        self.linear = nn.Linear(stack * MELS, latent)
        self.norm = nn.LayerNorm(latent)

    def forward(self, log_mel, padding_mask=None):
        missing = -log_mel.shape[1] % self.stack
        log_mel = F.pad(log_mel, (0, 0, 0, missing))
        if padding_mask is not None:
            padding_mask = F.pad(padding_mask, (0, missing), value=True)
            log_mel = log_mel.masked_fill(padding_mask[:, :, None], 0)
            padding_mask = padding_mask.unflatten(1, (-1, self.stack)).all(2)   # (B, L)
        stacked = log_mel.unflatten(1, (-1, self.stack)).flatten(2)             # (B, L, R * 64)
        return self.norm(self.linear(stacked)), padding_mask


def span_mask(noise, share, span, padding_mask=None):
    """Choose the steps to mask: random spans of `span` steps until `share` of a clip is masked.

    noise (B, L): uniform random numbers, one a step. The step with the largest starts the first
    span, the next largest the second, and so on without replacement; spans may overlap, none
    reaches into the padding. Drawing stops at exactly round(share * length) masked steps (which
    may cut the last span short), at least span + 1, so that there is more than one span: every
    clip of a length masks the same number, whatever else is in its batch. Returns the mask (B, L).
    """
    B, L = noise.shape
    if padding_mask is None:
        padding_mask = noise.new_zeros(B, L, dtype=torch.bool)
    lengths = (~padding_mask).sum(1, keepdim=True)                              # (B, 1)
    steps = torch.arange(L, device=noise.device)
    may_start = steps <= (lengths - span).clamp(min=0)
    noise = torch.where(may_start, noise, -1)
    # A step is masked as soon as a span that covers it is: one that starts on it or just before.
    urgency = F.max_pool1d(F.pad(noise, (span - 1, 0), value=-1), span, stride=1)   # (B, L)
    urgency = urgency.masked_fill(padding_mask, -2)
    rank = urgency.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    wanted = (share * lengths).round().clamp(min=span + 1)
    return rank < torch.minimum(wanted, lengths)


def masked_steps(mask, share, span):
    """Positions of the masked steps, in order: mask (B, L) -> steps (B, M), valid (B, M).

    M is the largest number that `span_mask` masks of L steps, known without looking at the mask, so
    that a GPU need not be waited for. Clips with fewer are filled up, valid is False there.
    """
    L = mask.shape[1]
    M = min(L, max(int(share * L) + 1, span + 1))
    steps = mask.int().argsort(dim=1, descending=True, stable=True)[:, :M]
    return steps, mask.gather(1, steps)


def sample_distractors(noise, valid):
    """K distractors for each masked step, uniform with replacement from the clip's other ones.

    noise (B, M, K) uniform in [0, 1), valid (B, M) -> indices (B, M, K) into the M masked steps,
    never the step itself. Meaningless where `valid` is False or a clip has a single masked step.
    """
    others = (valid.sum(1) - 1).clamp(min=1)[:, None, None]                     # (B, 1, 1)
    index = (noise * others).long().clamp(max=others - 1)           # a product may round up
    itself = torch.arange(valid.shape[1], device=valid.device)[:, None]         # (M, 1)
    index = index + (index >= itself)                                           # hop over itself
    return index.clamp(max=valid.shape[1] - 1)      # one masked step alone: meaningless, but an index


def contrastive_loss(context, targets, distractors, valid, temperature):
    """Eq. 1: find each masked step's own latent among K distractors, by cosine similarity.

    context c and targets z (B, M, C) at the masked steps; distractors (B, M, K) indices into M;
    valid (B, M) says which steps are masked ones. Similarities are divided by `temperature`, which
    is 1.0 in the equation as printed.

    Returns the loss (B, M) in nats at each step, 0 where it does not count, and a dictionary of
    (B, M) figures: `counts`, `correct`, `chance`, `duplicates`. A distractor that is equal to the
    target (silence, a loop) has no right answer: it is left out, and a step that has none left does
    not count. If such a step counted, its loss would be 0, and a collapsed model would look perfect.
    """
    with torch.autocast(context.device.type, enabled=False):     # bf16 would blur the differences
        similarity = F.normalize(context.float(), dim=2) @ F.normalize(targets.float(), dim=2).mT
    equal = (targets[:, :, None] == targets[:, None]).all(3)                    # (B, M, M)
    duplicate = equal.gather(2, distractors)                                    # (B, M, K)
    positive = similarity.diagonal(dim1=1, dim2=2)[:, :, None] / temperature    # (B, M, 1)
    negative = (similarity.gather(2, distractors) / temperature).masked_fill(duplicate, -torch.inf)
    counts = valid & ~duplicate.all(2) & (valid.sum(1, keepdim=True) > 1)
    loss = torch.cat([positive, negative], 2).logsumexp(2) - positive[:, :, 0]
    candidates = torch.zeros_like(similarity).scatter(2, distractors, (~duplicate).float()).sum(2)
    return loss * counts, dict(
        counts=counts,
        correct=(positive > negative).all(2) & counts,
        chance=1 / (1 + candidates),            # among the different ones: repeats do not count
        duplicates=duplicate.float().mean(2))


def latent_health(z, valid):
    """How different the latents of a clip are: latents z (B, M, C), valid (B, M) -> two scalars.

    The standard deviation over time of their components (root mean square over components and
    clips), and the mean cosine between two different latents of a clip.
    """
    real = valid[:, :, None]
    count = valid.sum(1)                                                        # (B,)
    mean = (z * real).sum(1, keepdim=True) / count[:, None, None]
    variance = ((z - mean).square().mean(2) * valid).sum() / valid.sum()
    # The cosines of all pairs add up to the squared length of the sum of the unit vectors.
    sums = (F.normalize(z, dim=2) * real).sum(1).square().sum(1)
    pairs = (count * (count - 1)).sum().clamp(min=1)
    return variance.sqrt(), (sums - count).sum() / pairs


class Wav2Vec2(nn.Module):
    """The model of Fig. 1a, with its pre-training loss.

    size is one of SIZES; `changes` replace single settings of SIZES and COMMON, for the ablations:
    Wav2Vec2("large", blocks=8). Raises ValueError for a size or setting that does not exist or fit.
    """

    def __init__(self, size="small", **changes):
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"no size '{size}': there are {', '.join(SIZES)}")
        settings = {**COMMON, **SIZES[size]}
        if unknown := changes.keys() - settings.keys():
            raise ValueError(f"no setting {', '.join(unknown)}: there are {', '.join(settings)}")
        self.settings = s = {**settings, **changes}     # all of it, to build the same model again
        for name in ("width", "blocks", "heads", "ffn", "stack", "latent", "span", "distractors"):
            if s[name] < 1:
                raise ValueError(f"{name} must be at least 1, not {s[name]}")
        if not 0 < s["mask"] < 1 or not 0 <= s["dropout"] < 1 or not s["temperature"] > 0:
            raise ValueError("mask must lie between 0 and 1, dropout in [0, 1), temperature over 0")
        if s["norm"] not in ("group", "batch"):
            raise ValueError(f"norm must be group or batch, not {s['norm']}")
        self.features = FeatureEncoder(s["stack"], s["latent"])
        self.mask_embedding = nn.Parameter(torch.rand(s["latent"]))
        self.input = nn.Linear(s["latent"], s["width"])
        self.conformer = Conformer(s["width"], s["blocks"], s["heads"], s["ffn"],
                                   s["first_kernel"], s["kernel"], s["dropout"], s["norm"])
        self.output = nn.Linear(s["width"], s["latent"])

    def encode(self, log_mel, padding_mask=None):
        """Embeddings for fine-tuning: log_mel (B, T, 64), padding_mask (B, T) or None ->
        the last block's output (B, L, D), nothing masked, and its padding mask (B, L) or None."""
        z, padding_mask = self.features(log_mel, padding_mask)
        return self.conformer(self.input(z), padding_mask), padding_mask

    def noise_shape(self, clips, frames):
        """Shape (B, L, 1 + K) of the random numbers that `forward` takes. Column 0 orders the spans;
        of the rest, row m draws the distractors of the m-th masked step."""
        return clips, -(-frames // self.settings["stack"]), 1 + self.settings["distractors"]

    def forward(self, log_mel, padding_mask=None, noise=None):
        """Pre-training: log_mel (B, T, 64), padding_mask (B, T) or None -> `Pretraining`.

        noise (`noise_shape`), uniform in [0, 1), decides on masks and distractors and nothing else
        does; drawn here where it is not given.
        """
        s = self.settings
        z, padding_mask = self.features(log_mel, padding_mask)                  # (B, L, C)
        if noise is None:
            noise = torch.rand(self.noise_shape(*log_mel.shape[:2]), device=z.device)
        mask = span_mask(noise[:, :, 0], s["mask"], s["span"], padding_mask)    # (B, L)
        masked_z = torch.where(mask[:, :, None], self.mask_embedding.to(z.dtype), z)
        context = self.conformer(self.input(masked_z), padding_mask)            # (B, L, D)

        steps, valid = masked_steps(mask, s["mask"], s["span"])                 # (B, M)
        index = steps[:, :, None]
        targets = z.gather(1, index.expand(-1, -1, z.shape[2]))         # from z, not from masked_z
        context = self.output(context.gather(1, index.expand(-1, -1, context.shape[2])))
        distractors = sample_distractors(noise[:, :steps.shape[1], 1:], valid)  # (B, M, K)
        loss, at = contrastive_loss(context, targets, distractors, valid, s["temperature"])

        count, masked_count = at["counts"].sum(), valid.sum()

        def mean(figure):
            return (figure * at["counts"]).sum() / count.clamp(min=1)

        real = mask.numel() if padding_mask is None else (~padding_mask).sum()
        latent_std, latent_cosine = latent_health(targets.detach().float(), valid)
        return Pretraining(
            loss=loss.sum() / count.clamp(min=1), count=count, accuracy=mean(at["correct"]),
            chance=mean(at["chance"]), masked=masked_count / real, latent_std=latent_std,
            latent_cosine=latent_cosine, duplicates=(at["duplicates"] * valid).sum() / masked_count,
            dropped=masked_count - count)


if __name__ == "__main__":
    print("model                       parameters       in the paper (Sec. 2.2 and 5.1.2)")
    for name, size, changes, paper in (
            ("tiny", "tiny", {}, "-"), ("small (cf S)", "small", {}, "18.4 M"),
            ("large (cf L)", "large", {}, "88.1 M"),
            ("large, 8 blocks", "large", dict(blocks=8), "58.9 M"),
            ("large, 20 blocks", "large", dict(blocks=20), "146.6 M")):
        count = sum(p.numel() for p in Wav2Vec2(size, **changes).parameters())
        print(f"{name:20} {count:13,} = {count / 1e6:5.1f} M   {paper}")
