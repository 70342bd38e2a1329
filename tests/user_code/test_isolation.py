"""What `undisturbed` promises: nothing of module, random streams and data sets is left changed."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from lightning_attr.user_code.generators import find_generators, reseed_generator, restore_generator
from lightning_attr.user_code.isolation import preserved_rng, undisturbed


class Broken(Exception):  # noqa: N818 - raised only to see what survives it
    """Raised by the tests."""


@contextmanager
def disturbing(module: nn.Module, *data: object, fails: bool) -> Iterator[None]:
    """`undisturbed`, left by an exception or not."""
    with suppress(Broken), undisturbed(module, *data):
        yield
        if fails:
            raise Broken


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.frozen_norm = nn.BatchNorm1d(3).eval()
        self.dropout = nn.Dropout()
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("average", torch.full((3,), float("nan")), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1  # in place, also in eval mode
        self.average = 0.5 * x.mean(0).detach()  # another tensor
        self.nothing = torch.ones(1)
        return self.dropout(self.frozen_norm(self.norm(self.layer(x)))) + self.frozen


def streams() -> list[object]:
    return [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]  # noqa: NPY002


def draw() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002


fails = pytest.mark.parametrize("fails", [False, True])


@fails
def test_random_streams_go_on_as_if_nothing_had_been(fails: bool) -> None:
    before = streams()
    expected = draw()
    for seed in (0, 1):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        assert streams() == before
        with disturbing(nn.Dropout(), fails=fails):
            draw()
            random.seed(seed)
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
        assert draw() == expected


def test_preserved_rng_alone_after_an_exception() -> None:
    def fail() -> None:
        with preserved_rng():
            draw()
            raise Broken

    before = streams()
    with pytest.raises(Broken):
        fail()
    assert streams() == before


@fails
def test_modes_come_back_submodule_by_submodule(fails: bool) -> None:
    module = Net().train()
    module.frozen_norm.eval()  # the usual way to freeze a BatchNorm inside a model in train mode
    before = {name: submodule.training for name, submodule in module.named_modules()}
    assert set(before.values()) == {True, False}
    with disturbing(module, fails=fails):
        assert not any(submodule.training for submodule in module.modules())
        module.train()
    assert {name: submodule.training for name, submodule in module.named_modules()} == before


@fails
def test_a_module_in_eval_mode_stays_there(fails: bool) -> None:
    module = Net().eval()
    with disturbing(module, fails=fails):
        module.layer.train()
    assert not any(submodule.training for submodule in module.modules())


@fails
def test_flags_and_gradients_come_back(fails: bool) -> None:
    module = Net()
    module.layer.weight.grad = torch.full((3, 3), 2.0)
    gradients = [p.grad for p in module.parameters()]
    flags = [p.requires_grad for p in module.parameters()]
    with disturbing(module, fails=fails):
        assert [p.requires_grad for p in module.parameters()] == flags
        module(torch.randn(4, 3)).sum().backward()  # accumulates into what is there
        module.layer.bias.grad = torch.ones(3)
        for p in module.parameters():
            p.requires_grad_(not p.requires_grad)
    assert [p.requires_grad for p in module.parameters()] == flags
    assert all(p.grad is before for p, before in zip(module.parameters(), gradients, strict=True))
    assert torch.equal(module.layer.weight.grad, torch.full((3, 3), 2.0))


@fails
def test_buffers_come_back_changed_in_place_or_replaced(fails: bool) -> None:
    module = Net()
    objects = dict(module._buffers)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with disturbing(module, fails=fails):
        module(torch.randn(4, 3))
        module.norm.train()
        module(torch.randn(4, 3))
        assert module.count == 2
    assert dict(module._buffers).keys() == objects.keys()
    assert all(module._buffers[name] is buffer for name, buffer in objects.items())
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0, equal_nan=True)
    assert module.nothing is None


def test_untouched_buffers_keep_their_version_and_touched_ones_their_place() -> None:
    module = Net()
    versions = {name: buffer._version for name, buffer in module.norm.named_buffers()}
    count = module.count
    with undisturbed(module):
        count.add_(1)
    assert {name: buffer._version for name, buffer in module.norm.named_buffers()} == versions
    assert module.count is count
    assert count == 0


def test_a_backward_pass_begun_before_can_be_finished_after() -> None:
    module = Net().train()
    loss = module.norm(module.layer(torch.randn(4, 3))).square().sum()
    with undisturbed(module):
        module(torch.randn(4, 3))
    loss.backward()
    assert module.layer.weight.grad is not None


def test_weights_are_left_alone() -> None:
    module = Net()
    versions = [p._version for p in module.parameters()]
    with undisturbed(module):
        module(torch.randn(4, 3))
    assert [p._version for p in module.parameters()] == versions


# Generators -----------------------------------------------------------------------------------------------------------


def generators() -> list[Any]:
    return [
        random.Random(3),
        np.random.default_rng(3),
        np.random.Generator(np.random.MT19937(3)),
        np.random.RandomState(3),
        torch.Generator().manual_seed(3),
    ]


def sample(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return torch.rand((), generator=generator).item()
    return float(generator.random() if hasattr(generator, "random") else generator.rand())


class Noisy(Dataset[float]):
    def __init__(self, *parts: object) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> float:
        return float(index)


@pytest.mark.parametrize("number", range(5))
@fails
def test_generators_of_a_data_set_go_on_as_if_nothing_had_been(number: int, fails: bool) -> None:
    generator, twin = generators()[number], generators()[number]
    sample(generator), sample(twin)
    data = ConcatDataset([Subset(Noisy({"transforms": [generator]}), [0, 1])])
    with disturbing(nn.Dropout(), data, fails=fails):
        sample(generator)
        reseed_generator(generator, 2**62 + 5)
        sample(generator)
    assert [sample(generator) for _ in range(3)] == [sample(twin) for _ in range(3)]


@pytest.mark.parametrize("number", range(5))
def test_reseeded_generators_repeat_and_restored_ones_go_back_as_often_as_wanted(number: int) -> None:
    generator = generators()[number]
    restore = restore_generator(generator)
    first = [sample(generator) for _ in range(3)]
    for seed in (0, 7, 2**62 + 5):
        reseed_generator(generator, seed)
        once = sample(generator)
        reseed_generator(generator, seed)
        assert sample(generator) == once
    for _ in range(2):
        restore()
        assert [sample(generator) for _ in range(3)] == first


class Transform:
    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def apply(self, x: float) -> float:
        return x + sample(self.generator)


def through_a_closure(generator: Any) -> Callable[[float], float]:
    return lambda x: x + sample(generator)


def add_noise(x: float, generator: Any) -> float:
    return x + sample(generator)


@pytest.mark.parametrize(
    "hide",
    [
        lambda g: g,
        lambda g: [g],
        lambda g: {"a": (g,)},
        Transform,
        lambda g: Transform(g).apply,
        through_a_closure,
        lambda g: functools.partial(add_noise, generator=g),
        lambda g: functools.partial(Transform(g).apply),
        lambda g: DataLoader([1], generator=g),
        lambda g: [Noisy(Transform(through_a_closure([{"deep": (Transform(g),)}])))],
    ],
)
def test_generators_are_found_wherever_a_transform_keeps_them(hide: Callable[[Any], object]) -> None:
    generator = torch.Generator()
    found = find_generators(ConcatDataset([Subset(Noisy(hide(generator)), [0]), Noisy()]))
    assert found == [generator]


def test_every_generator_is_found_once() -> None:
    own = generators()
    assert len(find_generators(Noisy(own, own, *own))) == len(own)


def test_the_search_stops_on_cycles() -> None:
    data, generator = Noisy(), random.Random()
    loop: list[object] = [data]
    loop += [loop, {"self": loop}, generator]
    data.loop = loop
    data.itself = data
    assert find_generators(data) == [generator]


def test_a_generator_near_the_root_is_found_though_a_long_way_leads_there_too() -> None:
    inner = Noisy(Noisy(Noisy(random.Random())))
    long_way: object = inner
    for _ in range(50):
        long_way = Noisy(long_way)
    assert len(find_generators(Noisy(inner, long_way))) == 1


def test_a_tree_of_samples_does_not_hide_the_transform_beside_it() -> None:
    tree: object = object()
    for _ in range(6):
        tree = [tree] * 3 + [[object() for _ in range(64)] for _ in range(61)]
    assert len(find_generators(Noisy(tree, Transform(random.Random())))) == 1
    assert len(find_generators(Noisy(Transform(random.Random()), tree))) == 1


def test_the_search_reads_little_of_long_lists() -> None:
    class Counted(list):  # type: ignore[type-arg]
        read = 0

        def __getitem__(self, index: Any) -> Any:
            result = super().__getitem__(index)
            self.read += len(result) if isinstance(index, slice) else 1
            return result

        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("all of the list was read")

    samples = Counted([object()] * 1_000_000)
    big = {i: object() for i in range(1_000_000)}
    assert find_generators(Noisy(samples, big, torch.zeros(10), np.zeros(10), "text")) == []
    assert samples.read <= 100


def test_modules_types_and_slots_do_no_harm() -> None:
    class Slotted:
        __slots__ = ("x",)

    assert find_generators(Noisy(np, torch, Slotted, Slotted(), len, print, 3, None, Noisy.__len__)) == []
