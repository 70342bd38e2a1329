"""Every public argument is checked in one way: who, what was expected, what came."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from wrong_calls import WrongCall, wrong_calls

from lightning_attr.arguments.checks import check_choice, check_float, check_int, check_path, check_tensor
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import TRAK, KNNShapley, LiSSA


@pytest.mark.parametrize("wrong", wrong_calls(), ids=str)
def test_wrong_calls_are_named(wrong: WrongCall) -> None:
    verdict, message = wrong.verdict()
    assert verdict == "named", message


def test_the_message_names_owner_argument_and_value_and_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"^Expected argument `k` of KNNShapley to be an integer >= 1, but got 2\.5"):
        KNNShapley(k=2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`method` of AttributionCallback .* the class TRAK\. .* such as `TRAK\(\)`"):
        AttributionCallback(method=TRAK)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'1GB'\. It counts bytes: 2 \* 1024\*\*3 are 2 GB\."):
        AttributionCallback(memory_budget="1GB")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"to be 'a', 'theta' or None, but got 'Teta'\. Did you mean 'theta'\?"):
        check_choice("f", "relative", "Teta", ("a", "theta", None))
    with pytest.raises(ValueError, match=r"a tensor of shape .n, m., but got a tensor of float32 and shape .2,."):
        check_tensor("f", "scores", torch.ones(2), "(n, m)", [2])
    with pytest.raises(ValueError, match="to be a path"):
        check_path("f", "path", "")


def test_numbers_of_numpy_become_pythons() -> None:
    assert [type(value) for value in (check_int("f", "k", np.int64(3)), check_float("f", "x", np.float32(0.5)))] == [
        int,
        float,
    ]
    assert KNNShapley(k=np.int32(5)).k == 5  # type: ignore[arg-type]
    assert TRAK(damping=np.float64(0.5)).config["damping"] == 0.5
    assert LiSSA(batch_size=np.int64(4)).batch_size == 4  # type: ignore[arg-type]
    assert TRAK(damping=0).damping == 0


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(1), "1", None, 1.0, [1]])
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(ValueError, match="to be an integer from 0 to 9, but got"):
        check_int("f", "k", value, 0, 9)
