"""wav2vec 2.0 on log-mels: learn from sound by predicting what was masked (Sec. 2.2, Fig. 1a and 1c).

A feature encoder turns each 80 ms of log-mels into a latent vector z. Some spans of latents are masked and
a conformer reads the rest. At each masked step its output, the context c, has to tell the latent that was
there from distractors: latents of other masked steps of the same clip.

    python wav2vec2.py     prints the sizes beside the paper's

Shapes: B clips, T frames, L latents in time (12.5 a second), D width of the conformer, E width of a latent,
M masked steps, K distractors.
"""
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from conformer import Conformer
from datasets import InputError, reading
from frontend import MELS, LogMel

SIZES = {
    "tiny": dict(dim=128, blocks=4, heads=4, ffn_dim=512),              # for a laptop
    "small": dict(dim=256, blocks=12, heads=8, ffn_dim=1024),           # cf S
    "large": dict(dim=768, blocks=12, heads=12, ffn_dim=1024),          # cf L
}
COMMON = dict(
    first_kernel=31, kernel=15, dropout=0.1, norm="group",
    stack=4,            # R: log-mel frames in a latent
    latent_dim=256,     # E
    mask_prob=0.3,      # share of the latents that are masked
    mask_length=3,      # latents in a masked span: 240 ms
    distractors=100,    # K
    temperature=0.1,    # divides the similarities of Eq. 1, as in wav2vec 2.0
)

# Sums over a batch, see `Wav2Vec2.forward`: those of micro-batches and processes just add, `summarize` divides them.
SUMS = ("count", "loss", "correct", "chance", "masked", "steps", "duplicates", "deviations", "cosine", "pairs",
        "too_short")


class PretrainOutput(NamedTuple):
    """What `Wav2Vec2` returns: the loss of Eq. 1, and sums from which `summarize` makes the logged figures."""
    loss: torch.Tensor          # mean over the masked steps that count, in nats
    count: torch.Tensor         # number of masked steps that count
    sums: torch.Tensor          # (len(SUMS),), without gradient


def summarize(sums):
    """The figures that tell how healthy a training is, from the numbers in SUMS: a dictionary.

    An accuracy that stays at chance, a latent_std that goes to 0 or a latent_cosine that goes to 1 mean
    that the latents have collapsed into one.
    """
    s = dict(zip(SUMS, sums, strict=True))
    count, masked = max(s["count"], 1), max(s["masked"], 1)
    return dict(
        loss=s["loss"] / count,                             # nats
        accuracy=s["correct"] / count,                      # share whose own latent scores above all distractors
        chance=s["chance"] / count,                         # the accuracy of a blind guess
        masked=s["masked"] / max(s["steps"], 1),            # share of the latents that are masked
        latent_std=(s["deviations"] / masked) ** 0.5,       # of the masked latents over time
        latent_cosine=s["cosine"] / max(s["pairs"], 1),     # mean between two masked latents of a clip
        duplicates=s["duplicates"] / masked,                # share of distractors that equal the target
        dropped=s["masked"] - s["count"],                   # masked steps without any other distractor
        too_short=s["too_short"])                           # clips with too few latents to mask any


def collapse_warning(figures):
    """What is wrong with a pre-training of these figures (see `summarize`), in words; None if nothing is."""
    if figures["latent_std"] < 0.01 or figures["latent_cosine"] > 0.99:
        return (f"the latents of a clip are nearly all alike (cosine {figures['latent_cosine']:.3f}, standard "
                f"deviation {figures['latent_std']:.3f}): collapsed, or the data are silence. Lower --lr, warm up "
                "longer, check the data")
    if figures["duplicates"] > 0.5:
        return (f"{figures['duplicates']:.0%} of the distractors equal their target: the data are largely silence "
                "or loops, from which nothing can be learned")
    return None


class FeatureEncoder(nn.Module):
    """Log-mels to latents z: stack R frames, one linear layer, LayerNorm (Sec. 2.2).

    log_mel (B, T, 64), padding_mask (B, T) or None -> z (B, L, E) and its padding mask (B, L) or None, with
    L = ceil(T / R). Frames missing from the last latent are 0, the mean of each band.
    """

    def __init__(self, stack, latent_dim):
        super().__init__()
        self.stack = stack
        self.linear = nn.Linear(stack * MELS, latent_dim)
        self.norm = nn.LayerNorm(latent_dim)

    def forward(self, log_mel, padding_mask=None):
        missing = -log_mel.shape[1] % self.stack
        log_mel = F.pad(log_mel, (0, 0, 0, missing))
        if padding_mask is not None:
            padding_mask = F.pad(padding_mask, (0, missing), value=True)
            log_mel = log_mel.masked_fill(padding_mask[:, :, None], 0)
            padding_mask = padding_mask.unflatten(1, (-1, self.stack)).all(2)   # (B, L)
        stacked = log_mel.unflatten(1, (-1, self.stack)).flatten(2)             # (B, L, R * 64)
        return self.norm(self.linear(stacked)), padding_mask


def span_mask(rand, mask_prob, mask_length, padding_mask=None):
    """Choose the steps to mask: random spans of `mask_length` steps until `mask_prob` of a clip is masked.

    rand (B, L): uniform random numbers, one a step. The step with the largest starts the first span, the
    next largest the second, and so on without replacement; spans may overlap, none reaches into the padding.
    Exactly round(mask_prob * length) steps are masked (which may cut the last span short), at least
    mask_length + 1, so that there is more than one span, and never all: every clip of a length masks the same
    number, whatever else is in its batch. Clips of up to mask_length + 1 steps are too short, and none of
    their steps is masked. Returns the mask (B, L).
    """
    B, L = rand.shape
    if padding_mask is None:
        padding_mask = rand.new_zeros(B, L, dtype=torch.bool)
    lengths = (~padding_mask).sum(1, keepdim=True)                              # (B, 1)
    steps = torch.arange(L, device=rand.device)
    may_start = steps <= lengths - mask_length
    rand = torch.where(may_start, rand, -1)
    # A step is masked as soon as a span that covers it is: one that starts on it or just before.
    score = F.max_pool1d(F.pad(rand, (mask_length - 1, 0), value=-1), mask_length, stride=1)    # (B, L)
    score = score.masked_fill(padding_mask, -2)
    order = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    number = (mask_prob * lengths).round().clamp(min=mask_length + 1).minimum(lengths - 1)
    return order < torch.where(lengths > mask_length + 1, number, 0)


def masked_steps(mask, mask_prob, mask_length):
    """Positions of the masked steps, in order: mask (B, L) -> steps (B, M), valid (B, M).

    M is at least the number that `span_mask` masks of L steps (one more at most), known without looking at
    the mask, so that a GPU need not be waited for. Clips with fewer are filled up; `valid` is False there.
    """
    L = mask.shape[1]
    M = min(L, max(int(mask_prob * L) + 1, mask_length + 1))
    steps = mask.int().argsort(dim=1, descending=True, stable=True)[:, :M]
    return steps, mask.gather(1, steps)


def sample_distractors(rand, valid):
    """K distractors for each masked step, uniform with replacement from the clip's other masked steps.

    rand (B, M, K) uniform in [0, 1), valid (B, M) -> indices (B, M, K) into the M masked steps,
    never the step itself. Meaningless where `valid` is False or a clip has a single masked step.
    """
    others = (valid.sum(1) - 1).clamp(min=1)[:, None, None]                     # (B, 1, 1)
    index = (rand * others).long().clamp(max=others - 1)            # a product may round up
    itself = torch.arange(valid.shape[1], device=valid.device)[:, None]         # (M, 1)
    index = index + (index >= itself)                               # skip the step itself
    return index.clamp(max=valid.shape[1] - 1)      # one masked step alone: meaningless, but an index


def contrastive_loss(context, targets, distractors, valid, temperature):
    """Eq. 1: find each masked step's own latent among K distractors, by cosine similarity.

    context c and targets z (B, M, E) at the masked steps; distractors (B, M, K) indices into M;
    valid (B, M) says which steps are masked ones. Similarities are divided by `temperature`, which
    is 1.0 in the equation as printed.

    Returns the loss (B, M) in nats at each step, 0 where it does not count, and a dictionary of (B, M)
    figures: `counts`, `correct`, `chance`, `duplicates`. A distractor equal to its target (silence, a loop)
    can't be told from it: it is left out, and a step that has none left does not count. If such a step
    counted, its loss would be 0, and a collapsed model would look perfect.
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
        chance=1 / (1 + candidates) * counts,       # among the different ones: repeats do not count
        duplicates=duplicate.float().mean(2) * valid)


def latent_health(z, valid):
    """How different the masked latents of a clip are: z (B, M, E), valid (B, M) -> three sums over the batch.

    The squared deviation of each latent from its clip's mean (mean over components); the cosine between
    two different latents of a clip; and the number of such pairs.
    """
    count = valid.sum(1)                                                        # (B,)
    z = z * valid[:, :, None]
    mean = z.sum(1, keepdim=True) / count.clamp(min=1)[:, None, None]
    deviations = ((z - mean).square().mean(2) * valid).sum()
    # The cosines of all pairs add up to the squared length of the sum of the unit vectors.
    cosine = F.normalize(z, dim=2).sum(1).square().sum(1) - count
    return deviations, cosine.sum(), (count * (count - 1)).sum()


def check_settings(s):
    """Raise ValueError for a model's settings that are impossible, or ask for memory that nobody has."""
    for name in ("dim", "blocks", "heads", "ffn_dim", "stack", "latent_dim", "mask_length", "distractors"):
        if not 1 <= s[name] <= 16_384:
            raise ValueError(f"{name} must be 1 to 16384, not {s[name]}")
    if s["blocks"] * s["dim"] * (4 * s["ffn_dim"] + 7 * s["dim"]) > 10**10:      # of four modules in each block
        raise ValueError("these sizes make over 10 billion weights, more than a machine could hold")
    if not 0 < s["mask_prob"] < 1 or not 0 <= s["dropout"] < 1 or not s["temperature"] > 0:
        raise ValueError("mask_prob must lie between 0 and 1, dropout in [0, 1), temperature over 0")
    if s["norm"] not in ("group", "batch"):
        raise ValueError(f"norm must be group or batch, not {s['norm']}")


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
        check_settings(s)
        self.features = FeatureEncoder(s["stack"], s["latent_dim"])
        self.mask_embedding = nn.Parameter(torch.rand(s["latent_dim"]))
        self.input_proj = nn.Linear(s["latent_dim"], s["dim"])
        self.conformer = Conformer(s["dim"], s["blocks"], s["heads"], s["ffn_dim"],
                                   s["first_kernel"], s["kernel"], s["dropout"], s["norm"])
        self.output_proj = nn.Linear(s["dim"], s["latent_dim"])

    def block_number(self, layer):
        """The number of a block, from 1 on: of "last", or of "middle", whose embeddings did best on ESC-10 (README).
        Raises InputError where there are fewer."""
        blocks = self.settings["blocks"]
        number = {"middle": (blocks + 1) // 2, "last": blocks}.get(layer, layer)
        if number > blocks:
            raise InputError(f"--layer {layer}: the model has only {blocks} conformer blocks")
        return number

    def encode(self, log_mel, padding_mask=None, layer=None):
        """Embeddings for fine-tuning: log_mel (B, T, 64), padding_mask (B, T) or None -> the output (B, L, D)
        of block `layer` (1 is the first, None the last), nothing masked, and its padding mask (B, L) or None."""
        z, padding_mask = self.features(log_mel, padding_mask)
        return self.conformer(self.input_proj(z), padding_mask, layer), padding_mask

    def latent_count(self, frames):
        """Number of latents L of so many frames."""
        return -(-frames // self.settings["stack"])

    def rand_shape(self, clips, frames):
        """Shape (B, L, 1 + K) of the random numbers that `forward` takes. Column 0 orders the spans;
        of the rest, row m draws the distractors of the m-th masked step."""
        return clips, self.latent_count(frames), 1 + self.settings["distractors"]

    def flops(self, frames):
        """Floating point operations of a training step on a clip of so many frames: two for each weight and
        latent, three times over for forward and backward pass, and those of attention."""
        L = self.latent_count(frames)
        weights = sum(p.numel() for p in self.parameters())
        return 6 * weights * L + 12 * self.settings["blocks"] * self.settings["dim"] * L**2

    def predict_masked(self, log_mel, padding_mask, rand):
        """Fig. 1c: mask some latents, and predict them from the others.

        log_mel (B, T, 64), padding_mask (B, T) or None, rand (B, L) for `span_mask` -> the mask (B, L), the padding
        mask (B, L) or None and, at the masked steps, context and targets (B, M, E), and valid (B, M), see
        `masked_steps`.
        """
        prob, length = self.settings["mask_prob"], self.settings["mask_length"]
        z, padding_mask = self.features(log_mel, padding_mask)                          # (B, L, E)
        mask = span_mask(rand, prob, length, padding_mask)                              # (B, L)
        masked_z = torch.where(mask[:, :, None], self.mask_embedding.to(z.dtype), z)
        context = self.conformer(self.input_proj(masked_z), padding_mask)               # (B, L, D)

        # The loss looks at the masked steps only. Targets come from z, not from masked_z.
        steps, valid = masked_steps(mask, prob, length)                                 # (B, M)
        index = steps[:, :, None]
        targets = z.gather(1, index.expand(-1, -1, z.shape[2]))                         # (B, M, E)
        context = self.output_proj(context.gather(1, index.expand(-1, -1, context.shape[2])))
        return mask, padding_mask, context, targets, valid

    def forward(self, log_mel, padding_mask=None, rand=None):
        """Pre-training: log_mel (B, T, 64), padding_mask (B, T) or None -> `PretrainOutput`.

        rand (`rand_shape`), uniform in [0, 1), decides on masks and distractors and nothing else does; drawn
        here where it is not given.
        """
        if rand is None:
            rand = torch.rand(self.rand_shape(*log_mel.shape[:2]), device=log_mel.device)
        mask, padding_mask, context, targets, valid = self.predict_masked(log_mel, padding_mask, rand[:, :, 0])
        distractors = sample_distractors(rand[:, :valid.shape[1], 1:], valid)           # (B, M, K)
        loss, at = contrastive_loss(context, targets, distractors, valid, self.settings["temperature"])

        with torch.no_grad():
            deviations, cosine, pairs = latent_health(targets.float(), valid)
            sums = dict(
                count=at["counts"].sum(), loss=loss.sum(), correct=at["correct"].sum(), chance=at["chance"].sum(),
                masked=valid.sum(), duplicates=at["duplicates"].sum(), too_short=(~mask.any(1)).sum(),
                steps=loss.new_full((), mask.numel()) if padding_mask is None else (~padding_mask).sum(),
                deviations=deviations, cosine=cosine, pairs=pairs)
            vector = torch.stack([sums[name].float() for name in SUMS])
        return PretrainOutput(loss.sum() / sums["count"].clamp(min=1), sums["count"], vector)


def load_checkpoint(run, script=None):
    """The checkpoint in a run's folder (or the file itself), on the CPU; `script` wrote it, if given.

    Runs no code that may be hidden in it. Raises InputError where it is missing or something else.
    """
    path = Path(run)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no checkpoint there; is the run's folder right?")
    with reading(path, "use another checkpoint"):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        written_by = checkpoint["script"]
        if not all(weight.isfinite().all() for weight in checkpoint["model"].values()):
            raise ValueError("weights that are not finite")
    if script not in (None, written_by):
        raise InputError(f"{path}: is from {written_by}, not from {script}; name the folder of such a run")
    return checkpoint


def load_weights(checkpoint, model, frontend):
    """Put a checkpoint's weights into a model and a frontend. Raises InputError where they don't fit."""
    try:
        model.load_state_dict(checkpoint["model"])
        frontend.load_state_dict(checkpoint["frontend"])
    except (RuntimeError, KeyError):
        raise InputError("the checkpoint's weights do not fit the model: it is of another version, or damaged; "
                         "use another") from None


def load_encoder(checkpoint):
    """The model of a checkpoint and its frontend, without the checkpoint's weights, for which see `load_weights`.

    Raises InputError for settings that don't exist here.
    """
    try:
        return Wav2Vec2(**checkpoint["settings"]), LogMel()     # the settings are complete, so no size counts
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"the checkpoint is of another version, or damaged ({error}): use another") from None


if __name__ == "__main__":
    print("model                       parameters       in the paper (Sec. 2.2 and 5.1.2)")
    for name, size, changes, paper in (
            ("tiny", "tiny", {}, "-"), ("small (cf S)", "small", {}, "18.4 M"),
            ("large (cf L)", "large", {}, "88.1 M"),
            ("large, 8 blocks", "large", dict(blocks=8), "58.9 M"),
            ("large, 20 blocks", "large", dict(blocks=20), "146.6 M")):
        count = sum(p.numel() for p in Wav2Vec2(size, **changes).parameters())
        print(f"{name:20} {count:13,} = {count / 1e6:5.1f} M   {paper}")
