"""Models of transformers through the mixin as it is: batches of their collators, padding, precision, memory."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from text_cases import FALLBACK, MODELS, VOCABULARY, LitText, gpt2, padded, samples, settled, t5
from torch import Tensor
from torch.utils.data import DataLoader

from cases import quiet_trainer
from lightning_attr.batches.nested import select_rows
from lightning_attr.curvature.fisher import fisher_batch
from lightning_attr.data.memory import MemoryBudget
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.gradients import HookedGradients, loop_gradients
from lightning_attr.methods import EKFAC, GradDot, Influence
from lightning_attr.outputs import LanguageModel
from lightning_attr.outputs.language_model import Kind
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import IdentityProjector

transformers = pytest.importorskip("transformers", minversion="4.57", reason="needs transformers")

ATTENTION = ["eager", "sdpa"]
SDPA = {"BERT", "GPT-2"}  # T5's bias by position needs the plain kernel


def _features(module: LitText, batch: Any, b: int, memory: MemoryBudget | None = None) -> dict[str, Tensor]:
    projection = IdentityProjector().bind(ParameterLayout.of(module), "final")
    with torch.autocast("cpu", enabled=False):  # as the package does
        chosen = plan(module, select_rows(batch, b, range(min(b, 4))), min(b, 4))
    assert all(name.endswith(FALLBACK) for name in chosen.fallback)
    return Featurizer(module, chosen, projection, memory)(batch, list(range(b)))


def _loop(module: LitText, batch: Any, b: int) -> Tensor:
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    rows = loop_gradients(lambda p, one: module.functional_output(p, {}, one), trainable, batch, b)
    return torch.cat([rows[name].flatten(1) for name in trainable], 1)


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_hooks_give_what_the_loop_gives(name: str, attention: str) -> None:
    if attention == "sdpa" and name not in SDPA:
        pytest.skip("no such kernel in this model")
    module, batch = settled(MODELS[name](attention)), padded(samples(name))
    found = _features(module, batch, 5)
    assert _error(found["features"], _loop(module, batch, 5)) < 1e-10
    losses = [
        module(**{key: torch.tensor([value]) for key, value in one.items()}).loss.double()
        * (1 if name == "BERT" else sum(label != -100 for label in one["labels"]))
        for one in samples(name)
    ]
    torch.testing.assert_close(found["loss"], torch.stack(losses).detach())  # transformers means over tokens


@pytest.mark.parametrize("kind", ["mean_loss", "margin_of_mean", "sum_of_margins"])
@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("model", ["GPT-2", "MT5"])
def test_hooks_give_what_the_loop_gives_for_every_kind(kind: Kind, positions: Any, model: str) -> None:
    output = LanguageModel(kind, positions, shift=model == "GPT-2")
    module = settled(gpt2(model_output=output) if model == "GPT-2" else t5(model_output=output))
    batch = padded(samples(model))
    assert _error(_features(module, batch, 5)["features"], _loop(module, batch, 5)) < 1e-10


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_padding_and_batches_change_no_output(name: str, attention: str) -> None:
    if attention == "sdpa" and name not in SDPA:
        pytest.skip("no such kernel in this model")
    module, found = settled(MODELS[name](attention)).float(), samples(name)
    with torch.no_grad():
        whole = module.functional_output({}, {}, padded(found))
        longer = module.functional_output({}, {}, padded(found, more=3))
        alone = torch.cat([module.functional_output({}, {}, padded([one])) for one in found])
    torch.testing.assert_close(longer, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-4)
    assert whole.unique().numel() == 5


@pytest.mark.parametrize("name", MODELS)
def test_autocast_comes_close(name: str) -> None:
    module, batch = settled(MODELS[name]()).float(), padded(samples(name))
    exact = _features(module, batch, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = _features(module, batch, 5)
    assert all(values.dtype in {torch.float32, torch.int64} for values in found.values())
    assert 0 < _error(found["output"], exact["output"]) < 0.02
    gaps = (found["features"] - exact["features"]).norm(dim=1) / exact["features"].norm(dim=1)
    assert gaps.median() < 0.02
    assert gaps.max() < 0.3  # one rectifier of T5 on the other side of zero


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    module, batch = settled(MODELS[name]()), padded(samples(name))
    expected = _features(module, batch, 5)["features"]
    module.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert _error(_features(module, batch, 5)["features"], expected) < 1e-10


def test_long_sequences_go_through_in_parts() -> None:
    module = settled(gpt2(length=256))
    batch = padded(samples("GPT-2", (256, 100, 200, 256, 30, 250, 64, 180)))
    sizes: list[int] = []
    # A hook: what an attribute of the model reaches is put back after each call.
    module.model.register_forward_pre_hook(lambda _, __, inputs: sizes.append(len(inputs["labels"])), with_kwargs=True)
    free = _features(module, batch, 8)
    assert max(sizes) == 8
    sizes.clear()
    bounded = _features(module, batch, 8, MemoryBudget(2**25))
    assert max(sizes[-3:]) < 8
    torch.testing.assert_close(bounded, free)


def _loaders(name: str, collate: Any, found: list[Any] | None = None) -> DataLoader[Any]:
    return DataLoader(found or samples(name), batch_size=2, collate_fn=collate)


@pytest.mark.parametrize("name", ["GPT-2", "MT5", "BERT"])
@pytest.mark.parametrize("form", [dict, UserDict, "BatchEncoding"])
def test_batches_of_collators_go_through_as_they_come(name: str, form: Any) -> None:
    wrap = transformers.BatchEncoding if form == "BatchEncoding" else form
    module = settled(MODELS[name]())
    loader = _loaders(name, lambda found: wrap(padded(found)))
    result = quiet_trainer().attribute(
        model=module, train_dataloaders=loader, targets="train", method=GradDot(IdentityProjector())
    )
    rows = _loop(module, padded(samples(name)), 5)
    q = module.model_output.out_to_loss(*module.attribution_step(padded(samples(name))))
    assert _error(torch.as_tensor(result.scores.values), q[:, None].detach() * (rows @ rows.T)) < 1e-4


def test_ekfac_draws_labels_where_there_are_labels() -> None:
    module, found = settled(gpt2()), samples("GPT-2")
    batch = padded(found)
    seen: list[Tensor] = []

    class Watched(LanguageModel):
        def loss(self, outputs: Any, targets: Tensor) -> Tensor:
            seen.append(targets)
            return super().loss(outputs, targets)

    hooks = HookedGradients(module, ["model.transformer.ln_f.weight"], direct=())
    for stream in fisher_batch(hooks, module.attribution_step, batch, Watched(), range(5)).streams:
        stream(lambda _: None)
    assert torch.equal(seen[0] == -100, batch["labels"] == -100)
    assert not torch.equal(seen[0], batch["labels"])
    with pytest.raises(ValueError, match='one target a sample for `labels="exact"`'):
        fisher_batch(hooks, module.attribution_step, batch, Watched(), range(5), labels="exact")


@pytest.mark.slow
def test_ekfac_scores_do_not_depend_on_batches() -> None:
    # More tokens than the widest layer has inputs: else the factors have null spaces, whose bases are arbitrary.
    module, found = settled(gpt2()), samples("GPT-2", (4, 7, 3, 6, 5) * 8)
    scores = [
        quiet_trainer()
        .attribute(
            model=module,
            train_dataloaders=DataLoader(found, batch_size=size, collate_fn=padded),
            targets="train",
            method=Influence(solver=EKFAC()),
        )
        .scores.values
        for size in (7, 40)
    ]
    assert _error(torch.as_tensor(scores[1]), torch.as_tensor(scores[0])) < 1e-3


def _attribute(module: Any, loader: Any) -> Any:
    return quiet_trainer().attribute(model=module, train_dataloaders=loader, targets="train")


def test_a_sample_without_labels_is_named() -> None:
    found = samples("GPT-2")
    found[3]["labels"] = [-100] * 6
    with pytest.raises(ValueError, match=r"to have at least one labelled token.*the ignored one"):
        _attribute(gpt2().eval(), _loaders("GPT-2", padded, found))


def test_sequences_that_nobody_padded() -> None:
    def ragged(found: list[Any]) -> dict[str, Any]:
        return {key: [one[key] for one in found] for key in found[0]}

    with pytest.raises(TypeError, match=r"Expected `labels` of the batch to be a tensor.*nobody padded the sequences"):
        _attribute(gpt2().eval(), _loaders("GPT-2", ragged))


def test_labels_outside_the_vocabulary() -> None:
    class NoLoss(LitText):
        def forward(self, labels: Tensor, **inputs: Tensor) -> Any:
            return self.model(**inputs)

    found = samples("GPT-2")
    found[1]["labels"][-1] = VOCABULARY
    with pytest.raises(ValueError, match=rf"labels in \[0, {VOCABULARY}\).*has the label {VOCABULARY}"):
        _attribute(NoLoss(gpt2().model, LanguageModel()).eval(), _loaders("GPT-2", padded, found))
