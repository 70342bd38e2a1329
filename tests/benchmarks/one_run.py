"""What one training run predicts best: ways to use its snapshots, against models retrained on half subsets.

    python tests/benchmarks/one_run.py [--settings cnn mlp32 text] [--seed 0] [--json FILE]

Choose by "tune", one family of subsets and half of the targets; everything else is from another family and the other
half. Gradients are exact and in memory (torch.func); kernels see 2048 random projections of them (one
sign for each parameter, another draw at every snapshot), or all of them ("unprojected", as a kernel of samples).
`price` is what the method differentiates, as a share of what training differentiates: one pass over the training set
for each snapshot. The second price is in seconds, of this script against the same training, without the targets' part.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import one_run_text as text
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import digits
from lightning_attr.metrics import linear_datamodeling_score
from lightning_attr.metrics.bootstrap import Ranking, correlation

PROJ_DIM = 2048
DAMPINGS = (0.1, 0.3, 1.0, 3.0, 10.0)
EKFAC_DAMPINGS = (0.003, 0.01, 0.1)
RESAMPLES = 200
TODAY = "TRAK 1.0, geometric, plain mean"


@dataclass
class Run:
    """A training with its weights at every epoch; epoch -1 are the initial weights."""

    model: nn.Module
    train: tuple[Tensor, Tensor]
    targets: tuple[Tensor, Tensor]
    output: Callable[[Tensor, Tensor], Tensor]
    margins: bool
    epochs: int
    weights: dict[int, dict[str, Tensor]]
    seconds: float

    @property
    def geometric(self) -> list[int]:
        """The default schedule of the callback."""
        return sorted({0, self.epochs - 1, *(2**i for i in range(20) if 2**i < self.epochs)})

    @property
    def even(self) -> list[int]:
        """As many epochs, evenly spaced."""
        count = len(self.geometric)
        return [round(i * (self.epochs - 1) / (count - 1)) for i in range(count)]


def one_margin(logits: Tensor, label: Tensor) -> Tensor:
    own = torch.arange(logits.shape[-1]) == label
    return torch.where(own, logits, 0).sum() - logits.masked_fill(own, -math.inf).logsumexp(-1)


def train(name: str, seed: int) -> Run:
    """The recipe of the ground truth on all samples, with a snapshot at every epoch's end."""
    torch.manual_seed(seed)
    if name == "text":
        sequences, held_out, vocabulary = text.load()
        model: nn.Module = text.start(vocabulary, seed)
        epochs, batch_size, make = text.EPOCHS, text.BATCH_SIZE, text.adamw
        data, targets = (sequences[:, :-1], sequences), (held_out[:, :-1], held_out)
        output = text.log_likelihood
    else:
        setting = digits.SETTINGS[name]
        x_train, x_test, y_train, y_test = digits.load(setting)
        data, targets, output = (x_train, y_train), (x_test, y_test), one_margin
        model = setting.network()
        epochs, batch_size = setting.epochs, setting.batch_size
        make = lambda model, steps: digits.sgd(model.parameters(), steps)  # noqa: E731  # the signature of adamw
    steps = epochs * math.ceil(len(data[0]) / batch_size)
    optimizer, schedule = make(model, steps)
    copy = lambda: {key: value.detach().clone() for key, value in model.named_parameters()}  # noqa: E731  # short
    weights, start = {-1: copy()}, time.perf_counter()
    for epoch in range(epochs):
        for batch in torch.randperm(len(data[0])).split(batch_size):
            optimizer.zero_grad()
            out = model(data[0][batch])
            loss = -output(out, data[1][batch]).mean() if name == "text" else F.cross_entropy(out, data[1][batch])
            loss.backward()
            optimizer.step()
            schedule.step()
        weights[epoch] = copy()
    seconds = time.perf_counter() - start
    return Run(model.eval(), data, targets, output, name != "text", epochs, weights, seconds)


def gradients(run: Run, epoch: int, samples: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Gradient of every sample's model output, name -> (b, *shape)."""

    def one(weights: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        out = functional_call(run.model, weights, (x[None],))
        return run.output(out, y[None])[0] if out.ndim == 3 else run.output(out[0], y)

    with sdpa_kernel(SDPBackend.MATH):
        parts = [
            vmap(grad(one), in_dims=(None, 0, 0))(run.weights[epoch], x, y)
            for x, y in zip(samples[0].split(128), samples[1].split(128), strict=True)
        ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def at(run: Run, epoch: int) -> Tensor:
    """What the model gives for the training samples."""
    return functional_call(run.model, run.weights[epoch], run.train[:1])  # type: ignore[no-any-return]  # torch's Any


def out_to_loss(run: Run, epoch: int) -> Tensor:
    """q = -dl/df of every training sample, (n,)."""
    if not run.margins:
        return torch.ones(len(run.train[0]))
    with torch.no_grad():
        return torch.sigmoid(-digits.margin(at(run, epoch), run.train[1]))


def flat(parts: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten(1) for part in parts.values()], 1)


def project(vectors: Sequence[Tensor], epoch: int) -> list[Tensor]:
    """Each parameter goes with a random sign to one of PROJ_DIM sums."""
    generator = torch.Generator().manual_seed(100 + epoch)
    size = vectors[0].shape[1]
    place = torch.randint(PROJ_DIM, (size,), generator=generator)
    sign = torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1
    return [torch.zeros(len(each), PROJ_DIM).index_add_(1, place, each * sign) for each in vectors]


def solve(gram: Tensor, products: Tensor, weight: Tensor, damping: float) -> Tensor:
    """Phi (Phi^T W Phi + lambda)^-1 Psi^T from Phi Phi^T (n, n) and Phi Psi^T (n, m), by the push-through identity.

    lambda is relative to the mean diagonal of a kernel of PROJ_DIM features.
    """
    root = weight.double().clamp(min=1e-10).sqrt()
    kernel = root[:, None] * gram.double() * root
    kernel.diagonal().add_(damping * kernel.diagonal().sum() / PROJ_DIM)
    factor = torch.linalg.cholesky(kernel)
    return (torch.cholesky_solve(root[:, None] * products.double(), factor) / root[:, None]).float()


def generalised_cross_validation(gram: Tensor, values: Tensor, weight: Tensor, damping: float) -> float:
    """GCV of the ridge regression of the model outputs on their own gradients: a criterion without retraining."""
    root = weight.double().clamp(min=1e-10).sqrt()
    kernel = root[:, None] * gram.double() * root
    kernel.diagonal().add_(damping * kernel.diagonal().sum() / PROJ_DIM)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel))
    residual = inverse @ (root * (values.double() - values.double().mean()))
    return float(residual.square().mean() / inverse.diagonal().mean() ** 2)


def matrices(parts: Mapping[str, Tensor]) -> list[Tensor]:
    """One (b, rows, columns) a layer, the bias as last column; a vector has one column."""
    found = []
    for name, part in parts.items():
        bias = name.removesuffix("weight") + "bias"
        if name.endswith("weight") and part.ndim > 2:
            matrix = part.flatten(2)
            found.append(torch.cat([matrix, parts[bias][:, :, None]], 2) if bias in parts else matrix)
        elif part.ndim == 2 and (not name.endswith("bias") or parts[name.removesuffix("bias") + "weight"].ndim == 2):
            found.append(part[:, :, None])
    return found


def ekfac(
    train: Sequence[Tensor], targets: Sequence[Tensor], weight: Tensor, dampings: Sequence[float]
) -> dict[float, Tensor]:
    """EK-FAC of sum_i w_i grad f_i grad f_i^T, bases from both sides of the samples' gradients (needs no labels drawn).

    George et al. (2018) with the bases of Gupta et al. (2018); damping relative to a layer's mean eigenvalue.
    """
    scores = dict.fromkeys(dampings, torch.zeros(()))
    for own, other in zip(train, targets, strict=True):
        weighted = own * weight.sqrt()[:, None, None]
        left = weighted.transpose(0, 1).flatten(1)
        right = weighted.flatten(0, 1)
        rows, columns = (torch.linalg.eigh((m @ m.T).double())[1].float() for m in (left, right.T))
        rotated, target = ((rows.T @ part @ columns).flatten(1) for part in (own, other))
        curvature = (rotated.square() * weight[:, None]).sum(0)
        for damping in dampings:
            scores[damping] = scores[damping] + (rotated / (curvature + damping * curvature.mean())) @ target.T
    return scores


@dataclass
class Snapshot:
    """Scores (n, m) by method, q included; mean self-influence with damping 1.0; a criterion by damping."""

    scores: dict[str, Tensor]
    self_influence: float
    criteria: dict[float, float]
    seconds: dict[str, float]


def score(run: Run, epoch: int, last: Tensor) -> Snapshot:
    """All methods at one snapshot; `last` are the gradients of the targets at the end of training."""
    begun = time.perf_counter()
    own = gradients(run, epoch, run.train)
    q = out_to_loss(run, epoch)
    seconds = {"gradients": time.perf_counter() - begun}
    other = gradients(run, epoch, run.targets)
    weight = q * (1 - q) if run.margins else q
    with torch.no_grad():
        output = torch.logit(1 - q) if run.margins else run.output(at(run, epoch), run.train[1])
        phi, psi = flat(own), flat(other)
        begun = time.perf_counter()
        small, target = project([phi, psi], epoch)
        gram, products = small @ small.T, small @ target.T
        found = {f"TRAK {d}": solve(gram, products, weight, d) for d in DAMPINGS}
        seconds["TRAK"] = (time.perf_counter() - begun) / len(DAMPINGS)
        criteria = {d: generalised_cross_validation(gram, output, weight, d) for d in DAMPINGS}
        found["TRAK 1.0 without Newton weights"] = solve(gram, products, torch.ones_like(q), 1.0)
        self_influence = float((q * solve(gram, gram, weight, 1.0).diagonal()).mean())
        full = phi @ phi.T
        found["TRAK 1.0 unprojected"] = solve(full, phi @ psi.T, weight, 1.0)
        found["TRAK 1.0 unprojected, targets at the end"] = solve(full, phi @ last.T, weight, 1.0)
        begun = time.perf_counter()
        layers = ekfac(matrices(own), matrices(other), weight, EKFAC_DAMPINGS)
        seconds["EK-FAC"] = time.perf_counter() - begun
        found |= {f"EK-FAC {d}": layers[d] for d in EKFAC_DAMPINGS}
        found["Grad-Dot"] = phi @ psi.T
    scores = {name: each * q[:, None] for name, each in found.items()}
    return Snapshot(scores, self_influence, criteria, seconds)


def normalised(scores: Tensor) -> Tensor:
    return scores / scores.std()


def combine(snapshots: Mapping[int, Snapshot], epochs: Sequence[int], method: str, equal: bool = True) -> Tensor:
    """Sum over snapshots, each divided by the standard deviation of its scores if `equal`."""
    return sum((normalised(s) if equal else s) for s in (snapshots[e].scores[method] for e in epochs))  # type: ignore[return-value]  # sum() of tensors


def candidates(run: Run, snapshots: Mapping[int, Snapshot]) -> dict[str, tuple[Tensor, int]]:
    """What is compared: scores, and the number of passes over the training set."""
    geometric, count = run.geometric, len(run.geometric)
    initial = [-1, *geometric]
    shared = sum(snapshots[e].scores["TRAK 1.0"] / snapshots[e].self_influence for e in initial)
    assert isinstance(shared, Tensor)
    rows = {
        "Grad-Dot, geometric, plain mean": (combine(snapshots, geometric, "Grad-Dot", equal=False), count),
        "TRAK 1.0, last": (combine(snapshots, geometric[-1:], "TRAK 1.0"), 1),
        TODAY: (combine(snapshots, geometric, "TRAK 1.0", equal=False), count),
        "TRAK 1.0, geometric without the last": (combine(snapshots, geometric[:-1], "TRAK 1.0"), count - 1),
        "TRAK 1.0, evenly spaced": (combine(snapshots, run.even, "TRAK 1.0"), count),
        "TRAK 1.0, initial + geometric, plain mean": (combine(snapshots, initial, "TRAK 1.0", equal=False), count + 1),
        "TRAK 1.0, initial + geometric, by self-influence": (shared, count + 1),
    }
    for method in snapshots[0].scores:
        if method != "Grad-Dot":
            rows[f"{method}, geometric"] = (combine(snapshots, geometric, method), count)
    rows["EK-FAC 0.01, last"] = (combine(snapshots, geometric[-1:], "EK-FAC 0.01"), 1)
    for name, epochs in {"geometric": geometric, "initial + geometric": initial}.items():
        own, layers = (combine(snapshots, epochs, method) for method in ("TRAK 1.0", "EK-FAC 0.01"))
        rows[f"TRAK 1.0, {name}"] = (own, len(epochs))
        rows[f"EK-FAC 0.01, {name}"] = (layers, len(epochs))
        rows[f"TRAK 1.0 + EK-FAC 0.01, {name}"] = (normalised(own) + normalised(layers), len(epochs))
    return rows


def paired_interval(scores: Tensor, other: Tensor, masks: Tensor, outputs: Tensor) -> tuple[float, float]:
    """95 % interval of the difference of the scores' LDS, over resampled subsets and targets, the same for both."""
    measured = Ranking(outputs.mean(0).double().T)
    one, two = (Ranking((masks.double() @ each.double()).T) for each in (scores, other))
    generator = torch.Generator().manual_seed(0)
    differences = []
    for _ in range(RESAMPLES):
        subsets, targets = (
            torch.bincount(torch.randint(size, (size,), generator=generator), minlength=size).double()
            for size in (len(masks), scores.shape[1])
        )
        apart = correlation(one, measured, subsets) - correlation(two, measured, subsets)
        differences.append(apart @ targets / targets.sum())
    low, high = torch.stack(differences).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def measure(name: str, seed: int) -> list[dict[str, Any]]:
    """Rows of one setting."""
    truth = text.ground_truth if name == "text" else partial(digits.ground_truth, digits.SETTINGS[name])
    (tune_masks, tune_outputs), (masks, outputs) = truth("tune"), truth("report")
    run = train(name, seed)
    last = flat(gradients(run, run.epochs - 1, run.targets))
    snapshots = {epoch: score(run, epoch, last) for epoch in sorted({-1, *run.geometric, *run.even})}
    order = torch.randperm(outputs.shape[-1], generator=torch.Generator().manual_seed(7))
    tune, report = order[: len(order) // 2], order[len(order) // 2 :]
    outputs, candidate = outputs[..., report], candidates(run, snapshots)
    today, rows = candidate[TODAY][0][:, report], []
    cost = {kind: sum(s.seconds[kind] for s in snapshots.values()) / len(snapshots) for kind in snapshots[0].seconds}
    for what, (scores, passes) in candidate.items():
        lds = linear_datamodeling_score(scores[:, report], masks, outputs, bootstrap=RESAMPLES)
        tuned = linear_datamodeling_score(scores[:, tune], tune_masks, tune_outputs[..., tune], bootstrap=0)
        each = cost["gradients"] + sum(cost[kind] for kind in ("TRAK", "EK-FAC") if kind in what)
        row = {"setting": name, "what": what, "figure": lds.mean.item(), "low": lds.low.item(), "high": lds.high.item()}
        row |= {"tune": tuned.mean.item(), "difference": paired_interval(scores[:, report], today, masks, outputs)}
        rows.append(row | {"price": passes / run.epochs, "seconds": passes * each / run.seconds})
    reference = next(row["figure"] for row in rows if row["what"] == TODAY)
    rows = [row | {"reference": reference, "ratio": row["figure"] / reference} for row in rows]
    rows.append({"setting": name, "what": "noise ceiling", "figure": lds.ceiling.item()})
    return rows + criteria(name, run, snapshots)


def criteria(name: str, run: Run, snapshots: Mapping[int, Snapshot]) -> list[dict[str, Any]]:
    """What could choose a damping without retraining: mean log GCV, and whether two halves of the snapshots agree."""
    rows = []
    for damping in DAMPINGS:
        halves = [combine(snapshots, run.geometric[i::2], f"TRAK {damping}").flatten() for i in (0, 1)]
        validation = [math.log(snapshots[epoch].criteria[damping]) for epoch in run.geometric]
        for what, figure in {
            "log GCV": sum(validation) / len(validation),
            "agreement of odd and even snapshots": torch.corrcoef(torch.stack(halves))[0, 1].item(),
        }.items():
            rows.append({"setting": name, "what": f"{what}, damping {damping}", "figure": figure})
    return rows


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        line = f"{row['what']:52}{row['figure']:7.3f}"
        if "low" in row:
            low, high = row["difference"]
            line += f"  {row['low']:.3f} to {row['high']:.3f}{row['tune']:7.3f}  {low:+.3f} to {high:+.3f}"
            line += f"{row['price']:6.2f}{row['seconds']:7.1f}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=["cnn", "mlp32", "text"], default=["cnn", "mlp32", "text"])
    parser.add_argument("--seed", type=int, default=0, help="of the run whose snapshots are used")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in arguments.settings:
        print(f"\n{name}, run of seed {arguments.seed}; the difference is to `{TODAY}`")
        head = f"{'95 % interval':>15}{'tune':>9}  {'difference, 95 %':16}{'price':>6}{'seconds':>8}"
        print(f"{'':52}{'LDS':>7}{head}", flush=True)
        rows += measure(name, arguments.seed)
        show([row for row in rows if row["setting"] == name])
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
