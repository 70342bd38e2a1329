"""What an optimizer of the Adam family knows of each parameter: moments, step, betas, eps and learning rate."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_attr.errors import AttributionError
from lightning_attr.parameters.layout import as_pairs

_MOMENTS = ("exp_avg", "exp_avg_sq")
_SETTINGS = "settings"


@dataclass(frozen=True)
class AdamMoments:
    r"""The optimizer's view of one parameter.

    Args:
        exp_avg: running mean of the gradients ``m``, in the shape of the parameter.
        exp_avg_sq: running mean of their squares ``v``, likewise.
        step: updates of the parameter so far.
        betas: decay of both means.
        eps: added to the root of ``v``.
        learning_rate: of the parameter's group, at the snapshot.
        kind: class of the optimizer.

    Example:
        >>> moments = AdamMoments(torch.zeros(1), torch.tensor([0.001]), 1, (0.9, 0.999), 0.0, 0.1, "Adam")
        >>> moments.preconditioner()
        tensor([1.])
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: float
    betas: tuple[float, float]
    eps: float
    learning_rate: float
    kind: str

    def preconditioner(self) -> Tensor:
        r"""Compute Adam's scale of each entry, :math:`D = 1 / (\sqrt{\hat v} + \epsilon)` (Kingma and Ba, 2015).

        Returns in the shape of the parameter; :math:`\hat v = v / (1 - \beta_2^t)`.
        """
        corrected: Tensor = self.exp_avg_sq / (1 - self.betas[1] ** self.step)
        return (corrected.sqrt() + self.eps).reciprocal()


@dataclass(frozen=True)
class OptimizerState:
    """The moments of all optimizers of a run, by parameter.

    Args:
        moments: parameter name -> its moments. A parameter that was never updated, for want of an optimizer or of
            gradients, has none.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        >>> layer(torch.ones(1)).backward()
        >>> optimizer.step()
        >>> state = OptimizerState.of([optimizer], layer)
        >>> sorted(state.moments), state.moments["weight"].exp_avg
        (['bias', 'weight'], tensor([[0.1000]]))
    """

    moments: Mapping[str, AdamMoments]

    @classmethod
    def of(cls, optimizers: Iterable[Optimizer], module: nn.Module) -> OptimizerState:
        """Read the state of optimizers; the tensors are theirs, not copied.

        Returns the moments of its trainable parameters.
        """
        names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
        moments: dict[str, AdamMoments] = {}
        for optimizer in optimizers:
            if hasattr(optimizer, "consolidate_state_dict"):  # each process has the moments of some parameters only
                raise AttributionError(
                    f"Expected an optimizer that keeps the moments of all parameters in each process, but "
                    f"{type(optimizer).__name__} shards them. Use the optimizer that it wraps."
                )
            for group in optimizer.param_groups:
                own = {names[id(p)]: p for p in group["params"] if id(p) in names}
                _check_group(optimizer, group, own)
                for name, p in own.items():
                    if optimizer.state.get(p):
                        moments[name] = _moments(optimizer.state[p], group, type(optimizer).__name__)
        return cls(moments)

    def tensors(self) -> dict[str, Tensor]:
        """Give everything as tensors, to be stored.

        Returns ``exp_avg/<name>`` and ``exp_avg_sq/<name>`` of each parameter, and ``settings``: the rest as the bytes
        of a JSON object, uint8.
        """
        tensors, settings = {}, {}
        for name, own in self.moments.items():
            tensors.update({f"{key}/{name}": getattr(own, key).detach() for key in _MOMENTS})
            settings[name] = {key: value for key, value in vars(own).items() if key not in _MOMENTS}
        text = json.dumps(settings, sort_keys=True).encode()
        return {**tensors, _SETTINGS: torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> OptimizerState:
        """Read what :meth:`tensors` gave."""
        settings: dict[str, dict[str, Any]] = json.loads(tensors[_SETTINGS].numpy().tobytes())
        return cls({
            name: AdamMoments(
                tensors[f"exp_avg/{name}"],
                tensors[f"exp_avg_sq/{name}"],
                **{**own, "betas": tuple(own["betas"])},
            )
            for name, own in settings.items()
        })


def _check_group(optimizer: Optimizer, group: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
    """Before the first step there are no moments yet, but whoever will have them has two betas."""
    updated = [optimizer.state[p] for p in own.values() if optimizer.state.get(p)]
    if own and ("betas" not in group or any(key not in state for state in updated for key in _MOMENTS)):
        raise AttributionError(
            f"Expected an optimizer with the moments `exp_avg` and `exp_avg_sq` of each parameter, but "
            f"{type(optimizer).__name__}, which updates `{next(iter(own))}`, has none. Train with Adam, AdamW or one "
            "of their kind, or choose a method that needs no optimizer state."
        )


def _moments(state: Mapping[str, Tensor], group: Mapping[str, Any], kind: str) -> AdamMoments:
    second = state.get("max_exp_avg_sq", state["exp_avg_sq"])  # AMSGrad divides by the largest so far
    beta1, beta2 = (float(beta) for beta in group["betas"])
    step, eps, rate = float(state["step"]), float(group["eps"]), float(group["lr"])
    return AdamMoments(as_pairs(state["exp_avg"]), as_pairs(second), step, (beta1, beta2), eps, rate, kind)
