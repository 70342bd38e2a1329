"""K-FAC and EK-FAC for any module and loss, without Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_attr.arguments.checks import check_callable, check_choice, check_float, check_instance, check_seed
from lightning_attr.batches.nested import select_rows
from lightning_attr.curvature.fisher import GradientBatch, Labels, fisher_batch, usual_labels
from lightning_attr.curvature.kronecker_factors import KroneckerFactors, KroneckerMethod
from lightning_attr.curvature.kronecker_inverse import KroneckerInverse
from lightning_attr.curvature.kronecker_layout import KroneckerLayout
from lightning_attr.gradients import HookedGradients, plan_gradients
from lightning_attr.gradients.functional import call_with
from lightning_attr.gradients.rules import check_layers
from lightning_attr.outputs import ModelOutput, NegativeLoss


def ekfac(
    module: nn.Module,
    loss: ModelOutput | Callable[[Any, Any], Tensor],
    batches: Iterable[tuple[Any, Tensor]],
    *,
    labels: Literal["auto", "exact", "sampled", "observed"] = "auto",
    method: KroneckerMethod = "ekfac",
    damping: float = 0.1,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> KroneckerInverse:
    r"""Fit an eigenvalue-corrected Kronecker factorisation of the Fisher information; return its damped inverse.

    The Fisher information of the mean loss over the samples, block by block: each layer's weight and bias
    (George et al., 2018; Grosse et al., 2023). It goes twice over the batches, in eval mode, with a forward and a
    backward pass each.

    Args:
        module: any module; of its trainable parameters those of linear layers and convolutions are covered, and the
            others give zero.
        loss: a model output such as :class:`lightning_attr.outputs.MulticlassMargin`, whose loss it is; or a function
            ``(outputs, targets) -> (b,)``, for ``labels="observed"``.
        batches: pairs ``(inputs, targets)``, on the module's device, that can be gone through more than once, such as a
            list or a data loader. ``module(inputs)`` gives the outputs, ``len(targets)`` is the batch size.
        labels: "sampled" from the model, one a sample (the true Fisher, equal to the Gauss-Newton matrix in
            expectation); "exact" for the expectation itself, at the price of a pass a label; "auto" for exact ones of
            up to 16 classes, or up to 16 outputs of a regression, and sampled ones beyond; "observed" for the empirical
            Fisher.
        method: "ekfac", or "kfac" without corrected eigenvalues.
        damping: in units of the mean eigenvalue of each layer.
        weight_decay: coefficient of the L2 term of the objective, as in ``torch.optim.SGD``.
        seed: sampled labels depend on it and on the position of a sample in ``batches``, not on the batch size.

    Returns:
        The inverse; its ``apply`` takes flat vectors ``(r, p)``, its ``apply_parameters`` a dict of parameters, and
        its ``layout`` says what is covered.

    Raises:
        NonFiniteGradientError: if a gradient is NaN or Inf.
        NotImplementedError: if ``loss`` has no distribution to take labels from.
        UnsupportedLayerError: if the module has no linear layer or convolution.
        ValueError: if the batches are empty or an iterator, or an argument is out of its range.

    Example:
        >>> from lightning_attr.outputs import Regression
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.zeros(2))]  # the Hessian is diag(2, 8)
        >>> inverse = ekfac(layer, Regression(), batches, labels="exact", damping=0)
        >>> inverse.apply(torch.tensor([[4.0, 4.0]]))
        tensor([[2.0000, 0.5000]])
    """
    check_instance("ekfac", "module", module, nn.Module, "an nn.Module")
    if not isinstance(loss, ModelOutput):
        check_callable("ekfac", "loss", loss, "a ModelOutput, or a function (outputs, targets) -> one loss a sample")
    check_instance("ekfac", "batches", batches, Iterable, "a list of batches (inputs, targets), or a data loader")
    check_choice("ekfac", "labels", labels, ("auto", "exact", "sampled", "observed"))
    check_choice("ekfac", "method", method, ("ekfac", "kfac"))
    check_float("ekfac", "damping", damping, minimum=0)
    check_float("ekfac", "weight_decay", weight_decay, minimum=0)
    check_seed("ekfac", seed)
    if iter(batches) is batches:
        raise ValueError(
            f"Expected argument `batches` to be a list or a data loader, which can be gone through twice, but got the "
            f"iterator {type(batches).__name__}. Pass `list(batches)`."
        )
    model_output = loss if isinstance(loss, ModelOutput) else NegativeLoss(loss)
    with _in_eval_mode(module):
        layout = _layout(module, model_output, batches)
        hooks = HookedGradients(module, layout.names, direct=())

        def step(batch: tuple[Any, Tensor]) -> tuple[Any, Tensor]:
            return module(batch[0]), batch[1]

        chosen: Labels
        if labels == "auto":
            first = next(iter(batches))
            with torch.no_grad():
                chosen = usual_labels(model_output.distribution(*step(first)), len(first[1]))
        else:
            chosen = labels

        def gradients(number: int) -> Iterator[GradientBatch]:
            start = 0
            for batch in batches:
                rows = range(start, start + len(batch[1]))
                start = rows.stop

                yield fisher_batch(hooks, step, batch, model_output, rows, labels=chosen, key=(seed, number))

        parameter = next(p for p in module.parameters() if p.requires_grad)
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        factors = KroneckerFactors.fit(layout, gradients, device=parameter.device, dtype=dtype)
    return KroneckerInverse(factors, damping=damping, method=method, weight_decay=weight_decay)


def _layout(module: nn.Module, model_output: ModelOutput, batches: Iterable[tuple[Any, Tensor]]) -> KroneckerLayout:
    """Find the layers whose gradients the hooks see in full, on a few samples."""
    batch = next(iter(batches), None)
    if batch is None:
        raise ValueError("Expected argument `batches` to hold at least one batch, but got none.")
    check_layers(module)
    layout = KroneckerLayout.of(module)
    few = list(islice(range(len(batch[1])), 4))

    def losses(batch: Any) -> Tensor:
        return model_output.loss(module(batch[0]), batch[1])

    plan = plan_gradients(
        module,
        losses,
        lambda parameters, batch: call_with(module, parameters, losses, batch),
        select_rows(batch, len(batch[1]), few),
        len(few),
    )
    return layout if not plan.fallback and not plan.direct else KroneckerLayout.of(module, plan.hooked, plan.direct)


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    modes = {layer: layer.training for layer in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for layer, training in modes.items():
            layer.training = training
