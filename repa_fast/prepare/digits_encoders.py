"""Train the two digits nets and write their weights: minutes on a CPU, no download.

    python -m repa_fast.prepare.digits_encoders --net digits-vit --out DIR
    python -m repa_fast.prepare.digits_encoders --net digits-judge --out DIR

Both see the train split only; the held-out split is read once, for the accuracy that is reported.

digits-vit, without labels, sums three losses over two augmented views of each image:
  - NT-Xent (SimCLR, arXiv 2002.05709) on projected mean tokens: global content;
  - pixel regression: a linear map of each token to its own patch before noise and cut-out, so that
    a token says what is at its place, and fills what is hidden from its context;
  - variance and covariance of token channels (VICReg, arXiv 2105.04906): no collapse of the tokens
    onto a few directions, nor onto one vector per position.
Afterwards the final norm's bias absorbs minus the mean token, as DINO's centring does: a cosine
against targets that share a large mean would be high for any prediction.
digits-judge is trained with cross-entropy on the same augmentations, from another seed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repa_fast.data.digits import digit_images
from repa_fast.encoders.digits import NUM_CLASSES, PATCH_SIZE, WIDTH, build_vit, normalize

BATCH = 75
PEAK_LR = 2e-3
WEIGHT_DECAY = 0.05
WARMUP = 0.05  # fraction of the steps
THREADS = 1  # fixed, because the order of summation and so the weights depend on it
SEEDS = {"digits-vit": 0, "digits-judge": 1}
EPOCHS = {"digits-vit": 80, "digits-judge": 150}

Loss = Callable[[Tensor, Tensor], Tensor]


def load_split(split: str) -> tuple[Tensor, Tensor]:
    """Return images uint8 (N, 3, 16, 16) and labels int64 (N,) of "train" or "val"."""
    images, labels = digit_images(split)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def warp(images: Tensor) -> Tensor:
    """Rotate (15 degrees), shear, scale (15 %) and shift (1.6 pixels) each image by random amounts.

    Images are float (B, 3, 16, 16), pixels in 0..255; what comes in from outside is 0 (paper).
    """
    uniform = torch.rand(6, len(images)) * 2 - 1  # (6, B) in [-1, 1)
    angle, shear = uniform[0] * 0.26, uniform[1] * 0.2  # radians, ratio
    scale_x, scale_y = 1 + 0.15 * uniform[2], 1 + 0.15 * uniform[3]
    shift = 0.2 * uniform[4:]  # of half the image side
    rows = [
        torch.stack([scale_x * angle.cos(), shear - angle.sin(), shift[0]], dim=-1),
        torch.stack([angle.sin(), scale_y * angle.cos(), shift[1]], dim=-1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def corrupt(images: Tensor) -> Tensor:
    """Change contrast, add noise and blank one square of up to 6 pixels a side in each image.

    Images are float (B, 3, 16, 16), pixels in 0..255; the three channels stay equal.
    """
    batch, _, side, _ = images.shape
    contrast = 0.6 + 0.8 * torch.rand(batch, 1, 1, 1)
    noise = 30 * torch.rand(batch, 1, 1, 1) * torch.randn(batch, 1, side, side)
    size = torch.randint(0, 7, (batch, 1))
    start = (torch.rand(2, batch, 1) * (side - size + 1)).long()  # (2, B, 1): top, left
    position = torch.arange(side)
    inside = (position >= start) & (position < start + size)  # (2, B, side)
    hole = inside[0, :, :, None] & inside[1, :, None, :]  # (B, side, side)
    return (images * contrast + noise).clamp(0, 255).masked_fill(hole[:, None], 0)


def nt_xent(embeddings: Tensor, temperature: float) -> Tensor:
    """Return SimCLR's loss (scalar) of two views, (2B, E); negatives are the batch."""
    both = F.normalize(embeddings, dim=-1)
    logits = both @ both.T / temperature
    logits.fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(both)).roll(len(both) // 2))


def token_redundancy(tokens: Tensor) -> Tensor:
    """Return VICReg's variance and covariance terms (scalar) of tokens (B, N, D).

    Each position is centred by itself, so that what differs between images counts, not position.
    """
    flat = (tokens - tokens.mean(dim=0)).flatten(0, 1)  # (B * N, D)
    covariance = flat.T @ flat / len(flat)  # (D, D)
    variance = covariance.diag()
    off_diagonal = covariance.square().sum() - variance.square().sum()
    return F.relu(1 - (variance + 1e-4).sqrt()).mean() + off_diagonal / WIDTH**2


def self_supervised_loss(vit: nn.Module) -> tuple[Loss, list[nn.Module]]:
    """Return digits-vit's loss on (images uint8, ignored labels) and the heads it trains along."""
    projector = nn.Sequential(
        nn.Linear(WIDTH, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64)
    )
    decoder = nn.Linear(WIDTH, PATCH_SIZE**2)

    def loss(images: Tensor, _labels: Tensor) -> Tensor:
        clean = warp(images.float().repeat(2, 1, 1, 1))  # (2B, 3, 16, 16): two views
        tokens = vit.forward_features(normalize(corrupt(clean)))
        contrast = nt_xent(projector(tokens.mean(dim=1)), temperature=0.3)
        grey = normalize(clean)[:, :1]
        patches = F.unfold(grey, PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2)  # (2B, N, 16)
        pixels = F.mse_loss(decoder(tokens), patches)
        return contrast + pixels + 2 * token_redundancy(tokens)

    return loss, [projector, decoder]


def supervised_loss(vit: nn.Module) -> tuple[Loss, list[nn.Module]]:
    """Return digits-judge's loss on (images uint8 (B, 3, 16, 16), labels int64 (B,))."""

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        logits = vit(normalize(corrupt(warp(images.float()))))
        return F.cross_entropy(logits, labels, label_smoothing=0.1)

    return loss, []


def fit(vit: nn.Module, heads: list[nn.Module], loss: Loss, epochs: int) -> None:
    """Train `vit` and `heads` in place on the train split: AdamW, one cycle of learning rate."""
    images, labels = load_split("train")
    parameters = [p for module in [vit, *heads] for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    steps = epochs * math.ceil(len(images) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=steps, pct_start=WARMUP, cycle_momentum=False
    )
    for epoch in range(1, epochs + 1):
        total = 0.0
        batches = torch.randperm(len(images)).split(BATCH)
        for batch in batches:
            value = loss(images[batch], labels[batch])
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            total += value.item()
        if epoch % 10 == 0 or epoch == epochs:
            print(f"epoch {epoch}/{epochs}  loss {total / len(batches):.4f}", flush=True)


@torch.no_grad()
def finished(vit: nn.Module, teacher: bool) -> tuple[dict[str, Tensor], float]:
    """Round the weights to float16; return them as a state_dict, and the held-out accuracy.

    A teacher's final bias is shifted first, so that the mean token over the train split is zero;
    its accuracy in [0, 1] is that of a linear probe on mean tokens.
    """
    images, labels = load_split("train")
    if teacher:
        vit.norm.bias -= vit.forward_features(normalize(images)).mean(dim=(0, 1))
    state = {key: value.half().contiguous() for key, value in vit.state_dict().items()}
    vit.load_state_dict({key: value.float() for key, value in state.items()})
    held_out, truth = load_split("val")
    if not teacher:
        return state, (vit(normalize(held_out)).argmax(dim=-1) == truth).float().mean().item()
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pooled, unseen = (
        vit.forward_features(normalize(split)).mean(dim=1).numpy() for split in (images, held_out)
    )
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(pooled, labels.numpy())
    return state, float(probe.score(unseen, truth.numpy()))


def main(argv: list[str] | None = None) -> None:
    """Train one net and write `DIR/<net>.safetensors`, with recipe and accuracy inside."""
    parser = argparse.ArgumentParser(description="Train one of the two digits nets.")
    parser.add_argument("--net", required=True, choices=sorted(SEEDS))
    parser.add_argument("--out", required=True, type=Path, help="folder for the weights")
    parser.add_argument("--epochs", type=int, help="default: as the packaged weights")
    args = parser.parse_args(argv)
    from safetensors.torch import save_file

    teacher = args.net == "digits-vit"
    epochs = EPOCHS[args.net] if args.epochs is None else args.epochs
    if epochs < 2:
        parser.error(f"--epochs is {epochs}, expected at least 2")  # a warm-up of no step divides
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEEDS[args.net])
    vit = build_vit(num_classes=0 if teacher else NUM_CLASSES)
    loss, heads = (self_supervised_loss if teacher else supervised_loss)(vit)
    fit(vit, heads, loss, epochs)
    state, accuracy = finished(vit.eval(), teacher)
    metadata = {
        "net": args.net,
        "accuracy": f"{accuracy:.4f}",
        "metric": "held-out linear probe on mean tokens" if teacher else "held-out accuracy",
        "seed": str(SEEDS[args.net]),
        "recipe": f"{'NT-Xent + pixels + VICReg on tokens' if teacher else 'cross-entropy'}, "
        f"{epochs} epochs, batch {BATCH}, AdamW lr {PEAK_LR}, wd {WEIGHT_DECAY}",
        "command": f"python -m repa_fast.prepare.digits_encoders --net {args.net} --out DIR",
        "torch": torch.__version__,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(state, args.out / f"{args.net}.safetensors", metadata)
    print(f"{args.net}: {metadata['metric']} {accuracy:.4f}")


if __name__ == "__main__":
    main()
