"""Contrastive models: simulated batches, the bank of the snapshot's own weights, real models, ground truth."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from cases import loader_of, quiet_trainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.data.loader import DataSource
from lightning_attr.evaluation import retrain_lds
from lightning_attr.evaluation.targets import outputs_at
from lightning_attr.features.featurizer import AttributionPlan, Featurizer, plan
from lightning_attr.gradients import loop_gradients
from lightning_attr.methods import TRAK, GradDot
from lightning_attr.modalities.contrastive import ContrastiveMixin
from lightning_attr.outputs import ContrastiveMargin, NegativeLoss
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import IdentityProjector
from lightning_attr.randomness.draws import Draw, Samples

N = 9


class TwoTowers(ContrastiveMixin, L.LightningModule):
    """Images of four numbers, texts of three."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        if seed is not None:
            torch.manual_seed(seed)
        self.image, self.text = nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        self.logit_scale = nn.Parameter(torch.tensor(1.5))

    def embed(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        image, text = self.image(batch[0]), self.text(batch[1])
        return F.normalize(image, dim=1), F.normalize(text, dim=1), self.logit_scale.exp()

    def training_step(self, batch: Any) -> Tensor:
        image, text, scale = self.embed(batch)
        similarity, own = scale * image @ text.T, torch.arange(len(image))
        return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2)


def pairs(n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randn(n, 3, generator=generator)


def take(batch: Any, rows: Any) -> tuple[Tensor, ...]:
    return tuple(part[list(rows)] for part in batch)


def samples(batch: Any) -> Samples:
    """In batches of four."""

    def read(rows: Any) -> Any:
        for start in range(0, len(rows), 4):
            yield rows[start : start + 4], take(batch, rows[start : start + 4])

    return Samples(len(batch[0]), read)


def double() -> tuple[TwoTowers, tuple[Tensor, ...]]:
    return TwoTowers(seed=0).double().eval(), tuple(part.double() for part in pairs())


def features(module: Any, batch: Any, batches: Any, snapshot: str = "final") -> dict[str, Tensor]:
    module.attribution_setup(samples(batch), snapshot)
    made = plan(module, take(batch, range(4)), 4)
    projection = IdentityProjector().bind(ParameterLayout.of(module), snapshot)
    featurizer = Featurizer(module, made, projection, snapshot=snapshot)
    order = [row for rows in batches for row in rows]
    parts = [featurizer(take(batch, rows), rows) for rows in batches]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {name: column[torch.tensor(order).argsort()] for name, column in joined.items()}


def slow_margins(module: TwoTowers, batch: Any, train: Any, row: int, others: list[int]) -> Tensor:
    """Both margins of one pair, pair by pair."""
    u, v, scale = module.embed(take(batch, [row]))
    with torch.no_grad():
        images, texts, _ = module.embed(train)
    own = scale * (u[0] @ v[0])
    of_image = torch.stack([scale * (u[0] @ texts[j]) for j in others])
    of_text = torch.stack([scale * (v[0] @ images[j]) for j in others])
    return torch.stack([own - of_image.exp().sum().log(), own - of_text.exp().sum().log()])


@pytest.mark.parametrize("negatives", [None, 3])
def test_features_are_those_of_a_loop_over_pairs(negatives: int | None) -> None:
    module, batch = double()
    module.attribution_negatives = negatives
    found = features(module, batch, [range(N)])
    assert "label" not in found
    for row in range(N):
        others = Draw([row], "final").others(N, negatives or N - 1, "negatives")[0].tolist()
        margins = slow_margins(module, batch, batch, row, others)
        gradient = torch.autograd.grad(margins.sum(), list(module.parameters()))
        torch.testing.assert_close(found["features"][row], torch.cat([g.flatten() for g in gradient]))
        torch.testing.assert_close(found["output"][row], margins.sum().detach())
        torch.testing.assert_close(found["loss"][row], F.softplus(-margins).mean().detach())
        torch.testing.assert_close(found["out_to_loss"][row], torch.sigmoid(-margins).mean().detach() / 2)


def test_the_loss_of_the_simulated_batch_satisfies_the_identity() -> None:
    """Checked by `plan`; with all other pairs, it is the loss of training on all pairs as one batch."""
    module, batch = double()
    module.model_output = NegativeLoss(ContrastiveMargin().loss)
    found = features(module, batch, [range(N)])
    torch.testing.assert_close(found["loss"].mean(), module.training_step(batch).detach())
    assert torch.equal(found["out_to_loss"], torch.ones(N).double())


@pytest.mark.parametrize("batches", [[[8, 3, 0], [1, 2, 4, 5, 6], [7]], [[row] for row in range(N)]])
def test_features_do_not_depend_on_batch_and_order(batches: Any) -> None:
    module, batch = double()
    module.attribution_negatives = 4
    found, expected = features(module, batch, batches), features(module, batch, [range(N)])
    for name, column in expected.items():
        torch.testing.assert_close(found[name], column)


def test_simulated_batches_are_each_pairs_own() -> None:
    module, batch = double()
    module.attribution_negatives = 5
    module.attribution_setup(samples(batch), "a")
    drawn = module.attribution_batch(batch, Draw(range(N), "a"))["negatives"]
    assert drawn.shape == (N, 5)
    for row in range(N):
        assert row not in drawn[row]
        assert len(drawn[row].unique()) == 5
        alone = module.attribution_batch(take(batch, [row]), Draw([row], "a"))["negatives"]
        assert torch.equal(alone[0], drawn[row])
    others = [module.attribution_batch(batch, Draw(range(N), *which))["negatives"] for which in (("b",), ("a", 1))]
    assert not any(torch.equal(drawn, other) for other in others)


def test_a_bank_of_some_pairs() -> None:
    module, batch = double()
    module.attribution_bank_size = 5
    module.attribution_setup(samples(batch), "a")
    bank = module._attribution_bank
    assert bank is not None
    rows = list(bank.position)
    assert len(rows) == 5
    assert rows == sorted(rows) != list(range(5))
    torch.testing.assert_close(bank.texts, module.embed(take(batch, rows))[1].detach())
    assert not bank.texts.requires_grad
    for row in range(N):
        drawn = module.attribution_batch(take(batch, [row]), Draw([row], "a"))["negatives"][0].tolist()
        assert len(drawn) == 4
        assert row not in [rows[place] for place in drawn]
    before = dict(bank.position)
    module.attribution_setup(samples(batch), "b")
    assert module._attribution_bank is not None
    assert dict(module._attribution_bank.position) == before


def test_every_pair_of_the_bank_is_drawn_by_pairs_outside_of_it() -> None:
    module, batch = double()
    module.attribution_bank_size, module.attribution_negatives = 5, 2
    module.attribution_setup(samples(batch), "a")
    outside = [row for row in range(400) if row not in module._attribution_bank.position]  # type: ignore[union-attr]
    drawn = module.attribution_batch(None, Draw(outside, "a"))["negatives"]
    counts = drawn.flatten().bincount(minlength=5)
    assert (counts - 2 * len(outside) / 5).abs().max() < 60  # four standard deviations


def test_the_bank_is_of_the_weights_of_its_snapshot(tmp_path: Path) -> None:
    module, batch = TwoTowers(seed=0), pairs()
    callback = AttributionCallback(
        tmp_path / "run", method=GradDot(IdentityProjector()), feature_dtype="float32", log=False
    )
    trainer = quiet_trainer(max_epochs=2, callbacks=[callback])
    trainer.fit(module, loader_of(TensorDataset(*batch), batch_size=3))
    result = trainer.attribute(train_dataloaders=loader_of(TensorDataset(*batch)), targets="train")
    torch.testing.assert_close(result.self_influence, result.scores.values.diagonal())
    for snapshot in callback.store.snapshots:
        module.load_state_dict(callback.store.weights(snapshot.key))
        found = callback.store.column(snapshot.key, "output")
        for row in range(N):
            others = Draw([row], snapshot.projection).others(N, N - 1, "negatives")[0].tolist()
            expected = slow_margins(module, batch, batch, row, others).sum()
            assert found[row].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)


def test_other_weights_need_another_bank() -> None:
    module, batch = double()
    before = features(module, batch, [range(N)])["features"]
    with torch.no_grad():
        module.text[2].weight.mul_(-1)
    stale = module.attribution_step(module.attribution_batch(batch, Draw(range(N), "final")))[0]
    after = features(module, batch, [range(N)])["features"]
    fresh = module.attribution_step(module.attribution_batch(batch, Draw(range(N), "final")))[0]
    assert not torch.allclose(before, after)
    assert not torch.allclose(stale, fresh)


def test_similarities_keep_their_digits_under_autocast() -> None:
    class Large(TwoTowers):
        def embed(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
            return F.normalize(batch[0][:, :3], dim=1), F.normalize(batch[1], dim=1), torch.tensor(100.0)

    module = Large()
    module.attribution_setup(samples(pairs()), "")
    batch = module.attribution_batch(pairs(), Draw(range(N)))
    with torch.autocast("cpu", torch.bfloat16):
        found = module.attribution_step(batch)[0]
    torch.testing.assert_close(found, module.attribution_step(batch)[0])


# Ground truth ---------------------------------------------------------------------------------------------------------


class Pairs(L.LightningDataModule):
    """Nine training pairs, four targets."""

    def train_dataloader(self) -> Any:
        return loader_of(TensorDataset(*pairs()), batch_size=2, shuffle=True)

    def test_dataloader(self) -> Any:
        return loader_of(TensorDataset(*pairs(4, seed=1)))


def expected_output(module: TwoTowers) -> Tensor:
    """Of the four targets, with the bank of the module's weights."""
    everything = [Draw([row]).others(N, N - 1, "negatives")[0].tolist() for row in range(4)]
    batch, train = pairs(4, seed=1), pairs()
    with torch.no_grad():
        return torch.stack([slow_margins(module, batch, train, j, everything[j]).sum() for j in range(4)])


@pytest.mark.parametrize("vectorise", [False, True])
def test_ground_truth_has_a_bank_for_each_retrained_model(tmp_path: Path, vectorise: bool) -> None:
    def trainer() -> L.Trainer:
        return quiet_trainer(L.Trainer, max_epochs=2)

    truth = retrain_lds(
        TwoTowers,
        trainer,
        Pairs,
        dirpath=tmp_path,
        num_subsets=4,
        seeds=1,
        alpha=0.7,
        vectorise=vectorise,
        keep_checkpoints=True,
        progress=False,
    )
    assert truth.outputs.shape == (1, 4, 4)
    for subset in range(4):
        (checkpoint,) = tmp_path.glob(f"checkpoints/subset={subset}-*.ckpt")
        module = TwoTowers()
        module.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
        torch.testing.assert_close(truth.outputs[0, subset].float(), expected_output(module), rtol=1e-4, atol=1e-5)


def test_each_set_of_weights_is_measured_with_its_own_bank() -> None:
    module, states = TwoTowers(), [TwoTowers(seed=seed).state_dict() for seed in (1, 2)]
    loads = [lambda state=state: module.load_state_dict(state) for state in states]
    train, target = (
        DataSource.of(loader, "training") for loader in (Pairs().train_dataloader(), Pairs().test_dataloader())
    )
    found = outputs_at(quiet_trainer(), module, None, target, loads, train=train)
    for state, outputs in zip(states, found, strict=True):
        module.load_state_dict(state)
        torch.testing.assert_close(outputs, expected_output(module))


# Real models ----------------------------------------------------------------------------------------------------------


class Held(ContrastiveMixin, L.LightningModule):
    """A model as `self.model`: nothing else is to be written."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def tiny_clip() -> nn.Module:
    # The mask of CLIP in transformers 4 can not be made in float64.
    transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")
    tower = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **tower,
        "vocab_size": 11,
        "max_position_embeddings": 6,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**tower, "image_size": 8, "patch_size": 4}, projection_dim=5
    )
    model: nn.Module = transformers.CLIPModel(config)
    return model


def check_against_loop(module: Any, made: AttributionPlan, batch: Any, given: Any) -> None:
    """The features of five pairs are their gradients, one by one, and none of them is zero."""
    projection = IdentityProjector().bind(ParameterLayout.of(module), "final")
    found = Featurizer(module, made, projection, snapshot="final")(batch, range(5))["features"]
    trainable = dict(module.named_parameters())
    loop = loop_gradients(lambda params, batch: module.functional_output(params, {}, batch), trainable, given, 5)
    torch.testing.assert_close(found, torch.cat([rows.reshape(5, -1) for rows in loop.values()], 1))
    assert (found.norm(dim=1) > 0).all()


def test_clip_of_transformers() -> None:
    module = Held(tiny_clip()).double().eval()
    ids = torch.randint(3, 11, (5, 6))
    ids[torch.arange(5), torch.tensor([5, 3, 4, 5, 2])] = 2
    batch = {
        "pixel_values": torch.randn(5, 3, 8, 8).double(),
        "input_ids": ids,
        "attention_mask": (ids == 2).flip(1).cumsum(1).flip(1),
    }

    def read(rows: Any) -> Any:
        yield rows, {name: values[list(rows)] for name, values in batch.items()}

    module.attribution_setup(Samples(5, read), "final")
    given = module.attribution_batch(batch, Draw(range(5), "final"))
    made = plan(module, batch, 5)
    slow = [name for name in made.fallback if not name.endswith(("class_embedding", "logit_scale"))]
    assert slow == []
    check_against_loop(module, made, batch, given)
    # What training computes of all five as one batch is what each computes against the four others.
    loss = ContrastiveMargin().loss(*module.attribution_step(given)).mean()
    torch.testing.assert_close(loss, module.model(**batch, return_loss=True).loss)


class OpenClip(nn.Module):
    """A stand-in with the methods of open_clip's models."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.tokens = nn.Linear(4, 3), nn.Embedding(7, 3)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, image: Tensor) -> Tensor:
        return self.visual(image)

    def encode_text(self, text: Tensor) -> Tensor:
        return self.tokens(text).mean(1)


def test_a_model_like_those_of_open_clip() -> None:
    module, batch = Held(OpenClip()).double().eval(), (torch.randn(N, 4).double(), torch.randint(7, (N, 5)))
    image, text, scale = module.embed(batch)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(N).double())
    torch.testing.assert_close(text, F.normalize(module.model.encode_text(batch[1]), dim=1))
    assert scale.item() == pytest.approx(2.718281828**2)
    found = features(module, batch, [range(N)])
    assert found["features"].shape == (N, sum(p.numel() for p in module.parameters()))


@pytest.mark.slow  # importing it takes seconds
@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_open_clip(kind: str, tower: str) -> None:
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip, which needs torchvision")
    vision = {
        "vit": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
        "resnet": {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8, "patch_size": None},
    }[tower]
    text = {"context_length": 7, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2}
    model = getattr(open_clip, kind)(8, vision, text)
    for parameter in model.parameters():  # its own start has vanishing text embeddings
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    module = Held(model).double().eval()
    size = vision["image_size"]
    batch = (torch.randn(5, 3, size, size).double(), torch.randint(1, 19, (5, 7)))
    module.attribution_setup(samples(batch), "final")
    given = module.attribution_batch(batch, Draw(range(5), "final"))
    made = plan(module, batch, 5)
    # The pooling of its ResNet calls a function of torch that takes all weights of an attention at once.
    assert [name for name in made.fallback if ".attnpool." not in name] == []
    check_against_loop(module, made, batch, given)


# Bad input ------------------------------------------------------------------------------------------------------------


def test_a_bank_that_does_not_exist() -> None:
    module, batch = double()
    for call in (lambda: module.attribution_batch(batch, Draw(range(N))), lambda: module.attribution_step({})):
        with pytest.raises(RuntimeError, match=r"TwoTowers to have a bank .*`attribution_setup` never ran"):
            call()


def test_a_batch_without_simulated_batches() -> None:
    module, batch = double()
    module.attribution_setup(samples(batch), "")
    with pytest.raises(TypeError, match=r"Expected a batch with simulated batches.* got a tuple without `negatives`"):
        module.attribution_step(batch)


def test_fewer_pairs_than_the_simulated_batch() -> None:
    module, batch = double()
    module.attribution_negatives = N
    with pytest.raises(
        ValueError, match=f"more than {N} pairs in the bank of TwoTowers.* but got {N}. Set it to at most 8"
    ):
        module.attribution_setup(samples(batch), "")
    module.attribution_negatives = None
    with pytest.raises(ValueError, match=r"at least two training pairs for the bank of TwoTowers.* but got 1"):
        module.attribution_setup(samples(take(batch, [0])), "")


@pytest.mark.parametrize("name", ["attribution_bank_size", "attribution_negatives"])
@pytest.mark.parametrize("value", [0, -3, 2.5, "all"])
def test_numbers_that_are_none(name: str, value: Any) -> None:
    module, batch = double()
    setattr(module, name, value)
    with pytest.raises(ValueError, match=f"`{name}` of TwoTowers to be a positive integer, but got {value!r}"):
        module.attribution_setup(samples(batch), "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda u, v, s: (u, v[1:], s),
            r"for each of 4 pairs, of shape \(4, d\), but got \(4, 3\) and \(3, 3\).*captions",
        ),
        (lambda u, v, s: (u, v[:, None], s), r"but got \(4, 3\) and \(4, 1, 3\)"),
        (lambda u, v, s: (u[:2], v[:2], s), r"but got \(2, 3\) and \(2, 3\)"),
        (lambda u, v, s: (u, v[:, :2], s), "texts of the same width, but got 3 and 2"),
        (lambda u, v, s: (u, v, s.expand(4)), r"one logit scale, but got a tensor of shape \(4,\)"),
    ],
)
def test_embeddings_that_do_not_fit(change: Any, message: str) -> None:
    class Wrong(TwoTowers):
        def embed(self, batch: Any) -> Any:
            return change(*super().embed(batch))

    with pytest.raises(ValueError, match=f"Expected `embed` of Wrong to return .*{message}"):
        Wrong().attribution_setup(samples(pairs()), "")


def test_a_scale_that_is_a_number() -> None:
    class Plain(TwoTowers):
        def embed(self, batch: Any) -> Any:
            return *super().embed(batch)[:2], 4.0

    module = Plain()
    module.attribution_setup(samples(pairs()), "")
    outputs, targets = module.attribution_step(module.attribution_batch(pairs(), Draw(range(N))))
    assert outputs.shape == (N, 2, N)
    assert targets is None


@pytest.mark.parametrize("model", [None, nn.Linear(1, 1), SimpleNamespace(encode_image=None)])
def test_a_model_that_is_not_known(model: Any) -> None:
    module = Held(nn.Identity())
    module.model = model if isinstance(model, nn.Module) else nn.Identity()
    with pytest.raises(TypeError, match=r"Expected Held to hold a CLIPModel .*Override `embed"):
        module.embed({"x": torch.zeros(1)})


def test_trak_of_pairs(tmp_path: Path) -> None:
    trainer = quiet_trainer(max_epochs=1, callbacks=[AttributionCallback(tmp_path / "run", method=TRAK(64), log=False)])
    trainer.fit(TwoTowers(seed=0), datamodule=Pairs())
    assert trainer.attribute(Pairs(), targets="test").scores.shape == (N, 4)
