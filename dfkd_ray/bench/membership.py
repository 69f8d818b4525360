"""Membership inference: a network's scores of images, and attacks that tell members from non-members. Pure.

The attacks are those of Carlini et al. 2022 (arXiv 2112.03570): the likelihood ratio with Gaussians of shadow models,
online and offline, and a global threshold. Each model is attacked in turn, and the others are its shadows. The score
phi of one image is (examples, queries), where the queries are the image and augmented copies of it. All attacks give a
number for each (model, example): the higher, the more it looks like a member.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

FEWEST_MODELS = 6  # each Gaussian has two models then
SMALLEST_STD = 1e-6  # nats; equal scores have no spread to divide by
Phi = Float[np.ndarray, "models examples queries"]
Keep = Bool[np.ndarray, "models examples"]
Scores = Float[np.ndarray, "models examples"]


def halves(num_models: int, num_examples: int, seed: int) -> Keep:
    """Which model has which example in its training set: each example in exactly half of the models, seeded.

    `ValueError` for an odd number of models, or fewer than `FEWEST_MODELS`.
    """
    if num_models % 2 or num_models < FEWEST_MODELS:
        raise ValueError(f"{num_models} shadow models: expected an even number of at least {FEWEST_MODELS}")
    order = np.random.default_rng(seed).random((num_models, num_examples)).argsort(axis=0)
    return order < num_models // 2


def log_odds(
    logits: Float[np.ndarray, "examples classes"], labels: Int[np.ndarray, " examples"]
) -> Float[np.ndarray, " examples"]:
    """phi = log p_y - log(sum of p_c over c != y), in float64, from logits: z_y - log(sum of exp(z_c) over c != y).

    Source: Carlini et al. 2022, the logit scaling log(p / (1 - p)). The probabilities themselves round to 0 and 1.
    `ValueError` for logits that are not finite.
    """
    if not np.isfinite(logits).all():
        raise ValueError("log odds: a logit is not finite; the network is broken")
    z = logits.astype(np.float64)
    own = np.take_along_axis(z, labels[:, None], axis=1)[:, 0]
    others = z.copy()
    np.put_along_axis(others, labels[:, None], -np.inf, axis=1)
    largest = others.max(axis=1, keepdims=True)
    return own - largest[:, 0] - np.log(np.exp(others - largest).sum(axis=1))


def medians(phi: Phi, chosen: Keep) -> Float[np.ndarray, "examples queries"]:
    """Per example and query the median over the chosen models."""
    ordered = np.sort(np.where(chosen[:, :, None], phi, np.inf), axis=0)
    count = chosen.sum(axis=0)[None, :, None]
    low, high = (np.take_along_axis(ordered, at, axis=0)[0] for at in ((count - 1) // 2, count // 2))
    return (low + high) / 2


def stds(phi: Phi, chosen: Keep, *, pooled: bool) -> Float[np.ndarray, "examples queries"]:
    """Standard deviations over the chosen models: each example's own, or one that all examples share, per query.

    The shared one is of the distances from each example's mean: how far the examples are apart is no part of it.
    """
    count = chosen.sum(axis=0)[:, None]
    kept = np.where(chosen[:, :, None], phi, 0.0)
    centred = np.where(chosen[:, :, None], phi - kept.sum(axis=0) / np.maximum(count, 1), 0.0)
    squares = np.square(centred).sum(axis=0)
    if pooled:
        shared = squares.sum(axis=0) / max(1, int((count - 1).clip(min=0).sum()))
        return np.maximum(np.sqrt(np.broadcast_to(shared, squares.shape)), SMALLEST_STD)
    return np.maximum(np.sqrt(squares / np.maximum(count - 1, 1)), SMALLEST_STD)


def shadows_of(keep: Keep, model: int) -> tuple[Keep, Keep]:
    """The models with and without each example that the attack on one model may use: as many of each kind.

    The attacked model is left out, and with it one of the other kind, the next in order. Otherwise the numbers would
    tell: without any leak, members would be one model short in one Gaussian and non-members in the other, and their
    AUC be below a half.
    """
    usable = np.ones_like(keep)
    usable[model] = False
    order = np.roll(np.arange(len(keep)), -model)
    partner = order[(keep[order] != keep[model]).argmax(axis=0)]
    usable[partner, np.arange(keep.shape[1])] = False
    return keep & usable, ~keep & usable


def likelihood_ratio(phi: Phi, keep: Keep, *, pooled: bool) -> Scores:
    """Online attack: log N(phi; in) - log N(phi; out), its mean over queries. Source: Carlini et al. 2022, algorithm 1.

    The Gaussians are of other models with and without the example. Their centres are medians.
    """
    found = []
    for model in range(len(phi)):
        logs = []
        for chosen in shadows_of(keep, model):
            std = stds(phi, chosen, pooled=pooled)
            z = (phi[model] - medians(phi, chosen)) / std
            logs.append(-np.square(z) / 2 - np.log(std))
        found.append((logs[0] - logs[1]).mean(axis=1))
    return np.stack(found)


def offline(phi: Phi, keep: Keep) -> Scores:
    """Attack without models that had the example: -log of the probability of a higher phi, its mean over queries.

    Source: Carlini et al. 2022, the offline variant of algorithm 1. The logarithm tells probabilities apart that are 0
    in floating point.
    """
    from scipy.special import log_ndtr

    found = []
    for model in range(len(phi)):
        _, without = shadows_of(keep, model)
        z = (phi[model] - medians(phi, without)) / stds(phi, without, pooled=True)
        found.append(-log_ndtr(-z).mean(axis=1))
    return np.stack(found)


def threshold(phi: Phi, keep: Keep) -> Scores:
    """Global threshold: phi itself, its mean over queries. It needs no shadow model."""
    return phi.mean(axis=2)


ATTACKS: dict[str, Callable[[Phi, Keep], Scores]] = {
    "online": lambda phi, keep: likelihood_ratio(phi, keep, pooled=True),
    "online_own_variance": lambda phi, keep: likelihood_ratio(phi, keep, pooled=False),
    "offline": offline,
    "threshold": threshold,
}
