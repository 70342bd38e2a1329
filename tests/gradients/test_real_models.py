"""Models of transformers and adapters of peft, as people train them: tiny, with random weights, nothing downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from text_cases import FALLBACK
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_attr import AttributionMixin
from lightning_attr.batches.nested import map_tensors, select_rows
from lightning_attr.features.featurizer import AttributionPlan, Featurizer, plan
from lightning_attr.gradients import hooked_layers, loop_gradients
from lightning_attr.outputs import NegativeLoss
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import IdentityProjector

transformers = pytest.importorskip("transformers", minversion="4.57", reason="needs transformers")
peft = pytest.importorskip("peft", minversion="0.17", reason="needs peft")

pytestmark = pytest.mark.filterwarnings(
    # transformers 5 renames gradient checkpointing; peft 0.21, and people for long, use the old name.
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",
)

B, LENGTH, VOCABULARY, WIDTH, CLASSES = 5, 7, 23, 16, 3
IGNORED = -100  # what transformers gives to labels of padding

Batch = dict[str, Tensor]


class Classifier(AttributionMixin, nn.Module):
    """One label a sample."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def attribution_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.network(**{key: x for key, x in batch.items() if key != "labels"}).logits, batch["labels"]


def _sum_over_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none").sum(1)


class LanguageModel(Classifier):
    """One label a token."""

    model_output = NegativeLoss(_sum_over_tokens)


def _text() -> Batch:
    """Sequences of different lengths, padded to the longest."""
    mask = (torch.arange(LENGTH) < torch.tensor([4, 7, 3, 6, 5])[:, None]).long()
    return {"input_ids": torch.randint(1, VOCABULARY, (B, LENGTH)) * mask, "attention_mask": mask}


def _text_with_class() -> Batch:
    return {**_text(), "labels": torch.arange(B) % CLASSES}


def _text_with_next_tokens() -> Batch:
    batch = _text()
    following = batch["input_ids"].roll(-1, 1).masked_fill(batch["attention_mask"].roll(-1, 1) == 0, IGNORED)
    return {**batch, "labels": following.index_fill(1, torch.tensor([LENGTH - 1]), IGNORED)}


def _pair_of_texts() -> Batch:
    target = torch.randint(1, VOCABULARY, (B, LENGTH - 1))
    labels = target.masked_fill(torch.arange(LENGTH - 1) >= torch.tensor([2, 6, 5, 3, 4])[:, None], IGNORED)
    return {**_text(), "decoder_input_ids": F.pad(target, (1, -1)), "labels": labels}


def _images() -> Batch:
    return {"pixel_values": torch.randn(B, 3, 8, 8), "labels": torch.arange(B) % CLASSES}


def _bert(attention: str) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=16,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=attention,
    )
    return transformers.BertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return transformers.GPT2LMHeadModel(config)


def _t5(kind: str) -> nn.Module:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": 2 * WIDTH,
        "num_layers": 2,
        "num_heads": 2,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
        "dropout_rate": 0.0,
        "initializer_factor": 0.2,  # at 1 two layers of this width amplify rounding errors a hundredfold
        "use_cache": False,
    }
    if kind == "T5":  # tied embeddings, one linear map before the activation; MT5: an own head, gated
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**settings))
    return transformers.MT5ForConditionalGeneration(transformers.MT5Config(tie_word_embeddings=False, **settings))


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def _vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        image_size=8,
        patch_size=4,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.ViTForImageClassification(config)


def _lora() -> nn.Module:
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    return peft.get_peft_model(_gpt2(), config)


@dataclass(frozen=True)
class Case:
    """A model, the kind of its output, and its batch."""

    network: Callable[[], nn.Module]
    kind: type[Classifier]
    batch: Callable[[], Batch]

    def module(self) -> Classifier:
        module = self.kind(self.network())
        with torch.no_grad():  # no weight at a special value: zero biases, unit norms, LoRA's zero B
            for p in module.parameters():
                p.add_(0.2 * torch.randn_like(p))
        return module.double().eval()


CASES = {
    "BERT, eager attention": Case(lambda: _bert("eager"), Classifier, _text_with_class),
    "BERT, sdpa attention": Case(lambda: _bert("sdpa"), Classifier, _text_with_class),
    "GPT-2": Case(_gpt2, LanguageModel, _text_with_next_tokens),
    "T5": Case(lambda: _t5("T5"), LanguageModel, _pair_of_texts),
    "MT5": Case(lambda: _t5("MT5"), LanguageModel, _pair_of_texts),
    "Llama": Case(_llama, LanguageModel, _text_with_next_tokens),
    "ViT": Case(_vit, Classifier, _images),
    "LoRA on GPT-2": Case(_lora, LanguageModel, _text_with_next_tokens),
}
PADDED = [name for name, case in CASES.items() if case.batch is not _images]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def _to(batch: Batch, dtype: torch.dtype) -> Batch:
    return map_tensors(batch, lambda x: x.to(dtype) if x.is_floating_point() else x)


def _plan(module: Classifier, batch: Batch, mode: str | None = None) -> AttributionPlan:
    return plan(module, select_rows(batch, B, range(4)), 4, mode)


def _features(module: Classifier, batch: Batch, chosen: AttributionPlan | None = None) -> Tensor:
    """Flattened gradients as the package computes them, (b, parameters)."""
    projection = IdentityProjector().bind(ParameterLayout.of(module), "final")
    rows = list(range(len(batch["labels"])))
    return Featurizer(module, chosen or _plan(module, batch), projection)(batch, rows)["features"]


def _reference(module: Classifier, batch: Batch) -> Tensor:
    """The same from a backward pass a sample."""
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    rows = loop_gradients(lambda p, b: module.functional_output(p, {}, b), trainable, batch, len(batch["labels"]))
    return torch.cat([rows[name].flatten(1) for name in trainable], 1)


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, over the largest value."""
    assert expected.isfinite().all()
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


def test_gradients_are_those_of_one_sample_after_the_other(case: Case) -> None:
    module, batch = case.module(), _to(case.batch(), torch.float64)
    assert _error(_features(module, batch), _reference(module, batch)) < 1e-10


def test_gradients_in_single_precision(case: Case) -> None:
    module, batch = case.module(), _to(case.batch(), torch.float64)
    expected = _reference(module, batch)
    assert _error(_features(module.float(), _to(batch, torch.float32)), expected) < 1e-5


def test_gradients_under_autocast_are_as_good_as_autograds(case: Case) -> None:
    # Relative to the norm of a sample's exact gradient: autograd itself is off by 0.085 for T5, 0.007 to 0.021 else.
    module, batch = case.module(), _to(case.batch(), torch.float64)
    exact = _reference(module, batch)
    module, batch = module.float(), _to(batch, torch.float32)
    chosen = _plan(module, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found, autograds = _features(module, batch, chosen), _reference(module, batch)
    ours, theirs = ((rows - exact).norm(dim=1) / exact.norm(dim=1) for rows in (found, autograds))
    print(f"bf16: ours {ours.max():.4f}, autograd's {theirs.max():.4f}")
    assert theirs.max() > 1e-3  # autocast was on
    assert ours.max() < 0.1
    assert ours.max() < 1.5 * theirs.max()


# transformers checkpoints only in train mode; there is no dropout here. In eval mode its hook on the embedding remains.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # torch, of checks without gradients
@pytest.mark.parametrize(("training", "reentrant"), [(False, False), (True, False), (True, True)])
def test_gradient_checkpointing_changes_nothing(case: Case, training: bool, reentrant: bool) -> None:
    module, batch, mode = case.module(), _to(case.batch(), torch.float64), "train" if training else "eval"
    calls: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda layer, _: calls.append(layer))
    try:
        chosen = _plan(module, batch, mode)
        calls.clear()
        expected, without = _features(module, batch, chosen), len(calls)
        module.network.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with_checkpoints = _plan(module, batch, mode)
        calls.clear()
        found, count = _features(module, batch, with_checkpoints), len(calls)
    finally:
        handle.remove()
    assert _error(found, expected) < 1e-10
    assert with_checkpoints.hooked == chosen.hooked
    assert count > 1.5 * without if training else count == without  # the layers did run again


def test_the_model_is_left_as_it_was(case: Case) -> None:
    module, batch = case.module(), _to(case.batch(), torch.float64)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    _features(module, batch)
    after = dict(module.named_parameters(remove_duplicate=False))
    assert after.keys() == parameters.keys()
    assert all(after[key] is parameters[key] for key in parameters)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("name", PADDED)
def test_more_padding_changes_nothing(name: str) -> None:
    module, batch = CASES[name].module(), CASES[name].batch()
    fill = {"input_ids": 1, "decoder_input_ids": 1, "attention_mask": 0, "labels": IGNORED}
    longer = {key: F.pad(x, (0, 3), value=fill[key]) if x.ndim == 2 else x for key, x in batch.items()}
    assert longer["input_ids"].shape == (B, LENGTH + 3)
    assert _error(_features(module, longer), _features(module, batch)) < 1e-10


def test_any_split_of_a_batch_gives_the_same(case: Case) -> None:
    module, batch = case.module(), _to(case.batch(), torch.float64)
    chosen = _plan(module, batch)
    whole = _features(module, batch, chosen)
    for parts in ([[0], [1, 2], [3, 4]], [[4, 3, 2, 1], [0]], [[i] for i in range(B)]):
        split = torch.cat([_features(module, select_rows(batch, B, part), chosen) for part in parts])
        assert _error(split, whole[[i for part in parts for i in part]]) < 1e-10


def test_only_adapters_have_features() -> None:
    case = CASES["LoRA on GPT-2"]
    module = case.module()
    chosen = _plan(module, case.batch())
    assert len(chosen.hooked) == 12
    assert all(".lora_" in name for name in chosen.hooked)


def test_no_parameter_needs_a_fallback(case: Case) -> None:
    module, batch = case.module(), _to(case.batch(), torch.float64)
    assert all(name.endswith(FALLBACK) for name in _plan(module, batch).fallback)


@pytest.mark.parametrize("make", ["Llama", "Mistral", "Phi3", "Qwen2", "Qwen3"])
def test_norms_have_rules(make: str) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = getattr(transformers, f"{make}Config")(vocab_size=16, num_hidden_layers=1, pad_token_id=0, **sizes)
    network = getattr(transformers, f"{make}ForCausalLM")(config)
    ruled = {name for own in hooked_layers(network).values() for name in own.values()}
    assert ruled == {name for name, _ in network.named_parameters()}
