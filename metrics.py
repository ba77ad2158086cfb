"""How good predictions are: accuracy and mean average precision.

Scores and labels are (N, C) arrays or tensors: N clips, C classes, labels 0 or 1. Scores may be on
any scale that rises with the probability; logits are best, as probabilities that round to the same
number tie.
"""
import numpy as np
import torch


def _arrays(scores, labels):
    """Both as numpy arrays on the CPU. Raises ValueError for shapes that differ or scores of NaN."""
    scores, labels = (torch.as_tensor(x).detach().cpu().double().numpy() for x in (scores, labels))
    if scores.ndim != 2 or scores.shape != labels.shape or len(scores) == 0:
        raise ValueError(f"scores and labels must both be (N, C), not {scores.shape}, {labels.shape}")
    if np.isnan(scores).any():
        raise ValueError("there are scores that are not a number")
    return scores, labels > 0.5


def accuracy(scores, labels):
    """Share of the clips whose highest score is at a class they have (top-1 accuracy)."""
    scores, labels = _arrays(scores, labels)
    return float(labels[np.arange(len(scores)), scores.argmax(1)].mean())


def average_precisions(scores, labels):
    """Average precision of each class (C,); NaN for a class that no clip has.

    The area under precision over recall, in steps: at each distinct score, the precision among the
    clips that score as high or higher, times the share of the class's clips that score just that.
    Clips of equal score are one step, as in scikit-learn: their order must not matter.
    """
    scores, labels = _arrays(scores, labels)
    result = np.full(scores.shape[1], np.nan)
    for c in np.flatnonzero(labels.any(0)):
        order = np.argsort(-scores[:, c], kind="stable")
        last_of_tie = np.append(np.diff(scores[order, c]) != 0, True)
        hits = np.cumsum(labels[order, c])[last_of_tie]
        seen = np.flatnonzero(last_of_tie) + 1
        result[c] = np.sum(np.diff(hits, prepend=0) * hits / seen) / hits[-1]
    return result


def mean_average_precision(scores, labels):
    """mAP: the mean of the average precision over the classes that some clip has.

    Raises ValueError where no class has one.
    """
    values = average_precisions(scores, labels)
    if np.isnan(values).all():
        raise ValueError("no clip has any label: there is no average precision")
    return float(np.nanmean(values))
