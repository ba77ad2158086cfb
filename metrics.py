"""How good predictions are: accuracy, mAP, MAUC and lwlrap, the metrics of Tables 1 to 3.

Scores and labels are (N, C) arrays or tensors: N clips, C classes, labels 0 or 1. Scores may be on any scale that rises
with the probability; logits are best, as probabilities that round to the same number tie. What has no answer (a class
that no clip has; in lwlrap, a clip without labels) is left out: the functions by class give NaN for it, which
`mean_over_classes` passes over. Where nothing is left, ValueError is raised.
"""
import numpy as np
import torch


def _arrays(scores, labels):
    """Both as numpy arrays on the CPU, labels of booleans. Raises ValueError for scores of NaN."""
    scores, labels = (torch.as_tensor(x).detach().cpu().double().numpy() for x in (scores, labels))
    if np.isnan(scores).any():
        raise ValueError("there are scores that are not a number")
    return scores, labels > 0.5


def accuracy(scores, labels):
    """Share of the clips whose highest score is at a class they have (top-1 accuracy)."""
    scores, labels = _arrays(scores, labels)
    return float(labels[np.arange(len(scores)), scores.argmax(1)].mean())


def _steps(scores, labels):
    """For one class, scores and labels (N,): how many clips score at least as high as each distinct
    score, from the highest down, and how many of these have the class: two arrays.

    Clips of equal score make one step, as in scikit-learn: their order must not matter.
    """
    order = np.argsort(-scores)
    ranked = scores[order]
    last_of_tie = np.append(ranked[1:] != ranked[:-1], True)        # two infinities tie too
    seen = np.flatnonzero(last_of_tie) + 1
    return seen, np.cumsum(labels[order])[last_of_tie]


def average_precisions(scores, labels):
    """Average precision of each class (C,); NaN for a class that no clip has.

    The area under precision over recall, in steps: at each distinct score, the precision among the
    clips that score as high or higher, times the share of the class's clips that score just that.
    """
    scores, labels = _arrays(scores, labels)
    result = np.full(scores.shape[1], np.nan)
    for c in np.flatnonzero(labels.any(0)):
        seen, hits = _steps(scores[:, c], labels[:, c])
        result[c] = np.sum(np.diff(hits, prepend=0) * hits / seen) / hits[-1]
    return result


def areas_under_roc(scores, labels):
    """ROC-AUC of each class (C,); NaN for a class that all clips have or none.

    The chance that a clip with the class scores higher than one without, ties counting half: the
    area under hits over false alarms, by trapezoids.
    """
    scores, labels = _arrays(scores, labels)
    result = np.full(scores.shape[1], np.nan)
    for c in np.flatnonzero(labels.any(0) & ~labels.all(0)):
        seen, hits = _steps(scores[:, c], labels[:, c])
        new_hits, new_alarms = np.diff(hits, prepend=0), np.diff(seen - hits, prepend=0)
        result[c] = np.sum(new_alarms * (hits - new_hits / 2)) / (hits[-1] * (seen - hits)[-1])
    return result


def mean_over_classes(values):
    """Mean over the classes that have a value. Raises ValueError where none has."""
    if np.isnan(values).all():
        raise ValueError("no class has both clips with it and clips to tell them from")
    return float(np.nanmean(values))


def lwlrap(scores, labels):
    """Label-weighted label-ranking average precision, of DCASE 2019 task 2 (FSDKaggle2019).

    For each label of each clip: among the classes that score at least as high in this clip, the
    share that are labels of it. The mean of that over all labels.
    """
    scores, labels = _arrays(scores, labels)
    clip, label = np.nonzero(labels)
    if len(clip) == 0:
        raise ValueError("no clip has any label: there is no lwlrap")
    above = scores[clip] >= scores[clip, label][:, None]            # (labels in all, C)
    return float(np.mean((above & labels[clip]).sum(1) / above.sum(1)))
