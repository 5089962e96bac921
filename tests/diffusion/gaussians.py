"""Gaussian data, whose velocity, score and noise are known, by SiT's formulas in SiT's time.

SiT's time tau is 1 - t: 0 is noise, 1 is data. Everything here is Python floats and one tensor x.
"""

import math

import torch

from repa_fast.testing import seeded

PATHS = ("linear", "GVP", "VP")
FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")
SHAPE = (3, 4, 2, 2)
LABELS = torch.tensor([0, 4, 9])
NULL = 10
STD = 0.5
EPS = 1e-3


def coefficients(path, tau):
    """alpha, sigma and their derivatives in tau."""
    if path == "linear":
        return tau, 1 - tau, 1.0, -1.0
    if path == "GVP":
        half_pi = math.pi / 2
        sin, cos = math.sin(half_pi * tau), math.cos(half_pi * tau)
        return sin, cos, half_pi * cos, -half_pi * sin
    log_mean = -0.25 * (1 - tau) ** 2 * (20 - 0.1) - 0.5 * (1 - tau) * 0.1
    d_log_mean = 0.5 * (1 - tau) * (20 - 0.1) + 0.5 * 0.1
    alpha, sigma = math.exp(log_mean), math.sqrt(-math.expm1(2 * log_mean))
    return alpha, sigma, alpha * d_log_mean, -math.exp(2 * log_mean) * d_log_mean / sigma


def diffusion(form, norm, path, tau):
    """SiT's w, of x += (v + w s) dt + sqrt(2 w) dW."""
    alpha, sigma, d_alpha, d_sigma = coefficients(path, tau)
    forms = {
        "constant": lambda: norm,
        "SBDM": lambda: norm * (d_alpha / alpha * sigma**2 - sigma * d_sigma),
        "sigma": lambda: norm * sigma,
        "linear": lambda: norm * (1 - tau),
        "decreasing": lambda: 0.25 * (norm * math.cos(math.pi * tau) + 1) ** 2,
        "increasing-decreasing": lambda: norm * math.sin(math.pi * tau) ** 2,
    }
    return forms[form]()


def means(labels, channels):
    """Mean of the data, (B, C, 1, 1), another for each label and channel."""
    label = labels.double().view(-1, 1, 1, 1)
    return 0.1 * label - 0.3 + 0.2 * torch.arange(channels).double().view(1, -1, 1, 1)


def predictions(path, x, tau, labels):
    """Velocity in SiT's time, score, noise and data, of data N(mean, STD^2) at x, fp64."""
    alpha, sigma, d_alpha, d_sigma = coefficients(path, tau)
    variance = alpha**2 * STD**2 + sigma**2
    deviation = x.double() - alpha * means(labels, x.shape[1])
    clean = means(labels, x.shape[1]) + alpha * STD**2 / variance * deviation
    noise = sigma / variance * deviation
    velocity = d_alpha * clean + d_sigma * noise
    return {"v": velocity, "score": -deviation / variance, "noise": noise, "clean": clean}


def bounds(path, *, singular, size=0.0):
    """SiT's first and last time of the steps; size is that of a last step, 0 without one."""
    first = EPS if singular and path != "VP" else 0.0
    if size:
        return first, 1 - size
    return first, 1 - EPS if singular or path == "VP" else 1.0


def flow(path, x, start, stop):
    """Where the ODE takes x from tau = start to tau = stop, without guidance."""
    (a0, s0, *_), (a1, s1, *_) = (coefficients(path, tau) for tau in (start, stop))
    mean = means(LABELS, x.shape[1])
    ratio = math.sqrt((a1**2 * STD**2 + s1**2) / (a0**2 * STD**2 + s0**2))
    return a1 * mean + ratio * (x - a0 * mean)


class Recorder:
    """A model that records its calls; `answer` gives its output."""

    num_classes = NULL

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y):
        assert t.shape == y.shape == x.shape[:1] and (t == t[0]).all()
        self.calls.append((x.clone(), t.clone(), y.clone()))
        return self.answer(x, t[0].item(), y).to(x.dtype), []

    @property
    def times(self):
        return [t[0].item() for _, t, _ in self.calls]

    @property
    def states(self):
        """x at every call, the conditional half."""
        return [x[: len(LABELS)] for x, _, _ in self.calls]


class Model(Recorder):
    """The exact prediction, in our time."""

    def __init__(self, path="linear", prediction="v"):
        super().__init__()
        self.path = path
        self.prediction = prediction

    def answer(self, x, t, y):
        value = predictions(self.path, x, 1 - t, y)[self.prediction]
        return -value if self.prediction == "v" else value


def latents(dtype=torch.float64):
    return seeded(SHAPE, seed=1, dtype=dtype)
