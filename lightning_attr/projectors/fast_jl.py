"""Dense random signs by the CUDA kernel of TRAK, fast-jl, for features that are to be compared with that project's."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_int
from lightning_attr.arguments.messages import argument_message
from lightning_attr.errors import AttributionError, MissingDependencyError
from lightning_attr.gradients.factored import ParameterGradient
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors.base import Projection, Projector, flat_rows
from lightning_attr.randomness.streams import hashed_seed

_MULTIPLE = 512
_MOST_ENTRIES = 2**31
"""Rows times parameters per call; the kernel counts them in 32 bits."""
_LARGEST = 2.0**14
"""Rows are scaled to this magnitude, as the kernel computes in float16, which ends at 65,504."""


class FastJLProjector(Projector):
    r"""Entries :math:`\pm 1/\sqrt{k}` drawn on the fly on a CUDA device (Park et al., 2023, TRAK, appendix B.2).

    This file has not been run on hardware: its tests replace the kernel by a stand-in on the CPU. The kernel's products
    have float16 digits, and its matrix depends on the number of multiprocessors that it is told; both are in the
    store's manifest, so that features of two kinds of GPU are not mixed by mistake.
    :class:`lightning_attr.projectors.RademacherProjector` has no such limits.

    The package ``fast-jl`` is compiled while it is installed, with the CUDA toolkit of the installed torch:
    ``pip install --no-build-isolation "lightning_attr[fast]"``. The source of its version 0.1.3 names the architecture
    ``compute_70``, which CUDA 13 no longer knows: there, unpack the source, put your GPU's (``compute_90`` for an H100)
    in its place in ``setup.py``, and install from that folder.

    Args:
        proj_dim: projection dimension ``k``, a multiple of 512.
        seed: projections of equal seed, layout, snapshot and ``num_sms`` are equal.
        num_sms: multiprocessors that the kernel is told; by default those of the GPU at hand.
        rows: samples per call, 8, 16 or 32; 32 is too many for some GPUs (a V100 takes 16).

    Raises:
        ValueError: if ``proj_dim`` or ``rows`` is none of these.

    Example:
        >>> FastJLProjector(proj_dim=512, num_sms=108).config  # doctest: +ELLIPSIS
        {'kind': 'fast_jl', 'proj_dim': 512, 'seed': 0, 'num_sms': 108, 'rows': 32}
    """

    kind: ClassVar[str] = "fast_jl"

    def __init__(self, proj_dim: int = 2048, seed: int = 0, num_sms: int | None = None, rows: int = 32) -> None:
        super().__init__(proj_dim, seed)
        if proj_dim % _MULTIPLE:
            raise ValueError(f"Expected argument `proj_dim` to be a multiple of {_MULTIPLE}, but got {proj_dim}.")
        if check_int(self, "rows", rows) not in {8, 16, 32}:
            raise ValueError(argument_message(self, "rows", "8, 16 or 32", rows))
        self._num_sms = None if num_sms is None else check_int(self, "num_sms", num_sms, minimum=1, also="None")
        self.rows = rows

    @property
    def num_sms(self) -> int:
        """Multiprocessors that the kernel is told.

        Raises:
            AttributionError: if they are not given and there is no CUDA device.
        """
        if self._num_sms is None:
            if not torch.cuda.is_available():
                raise AttributionError(
                    "FastJLProjector needs a CUDA device, but there is none. Use RademacherProjector, which runs on "
                    "every device, or give `num_sms` to read a store that was written elsewhere."
                )
            self._num_sms = int(torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)
        return self._num_sms

    def bind(self, layout: ParameterLayout, snapshot: str) -> Projection:
        """Prepare the projection of a snapshot.

        Args:
            layout: the parameters.
            snapshot: key of the snapshot.

        Returns:
            The linear map; it takes gradients on a CUDA device only.

        Raises:
            MissingDependencyError: if fast-jl is not installed.
        """
        try:
            kernels = importlib.import_module("fast_jl")
        except ImportError as error:
            raise MissingDependencyError(
                "FastJLProjector needs the package fast-jl, which is compiled against the installed torch and CUDA: "
                '`pip install --no-build-isolation "lightning_attr[fast]"`. Or use RademacherProjector.'
            ) from error
        kernel = getattr(kernels, f"project_rademacher_{self.rows}")
        return _FastJLProjection(layout, self.proj_dim, kernel, self.rows, self.num_sms, (self.seed, snapshot))

    @property
    def config(self) -> dict[str, Any]:
        """What a store records of the projector: kind and arguments."""
        return {**super().config, "num_sms": self.num_sms, "rows": self.rows}


class _FastJLProjection(Projection):
    def __init__(
        self,
        layout: ParameterLayout,
        proj_dim: int,
        kernel: Callable[[Tensor, int, int, int], Tensor],
        rows: int,
        num_sms: int,
        key: tuple[object, ...],
    ) -> None:
        super().__init__(proj_dim)
        self.layout = layout
        self.kernel = kernel
        self.rows = rows
        self.num_sms = num_sms
        self.key = key

    def accumulate(self, features: Tensor, name: str, gradient: ParameterGradient) -> None:
        _check_device(features)
        values = flat_rows(gradient, self.layout.shapes[name])  # (b, size)
        width = _MOST_ENTRIES // self.rows
        for start in range(0, values.shape[1], width):
            seed = hashed_seed(*self.key, name, start) % 2**31
            for row in range(0, len(values), self.rows):
                part = values[row : row + self.rows, start : start + width]
                features[row : row + self.rows] += self._project(part, seed).to(features.dtype)

    def _project(self, values: Tensor, seed: int) -> Tensor:
        """Scale rows into the range of float16 by powers of two, pad to whole blocks, call the kernel, undo both."""
        largest = values.abs().amax(1, keepdim=True).float().clamp(min=torch.finfo(torch.float32).tiny)
        scale = torch.exp2(torch.floor(torch.log2(_LARGEST / largest)).clamp(-100, 100))
        padded = values.new_zeros(self.rows, values.shape[1], dtype=torch.float32)
        padded[: len(values)] = values.float() * scale
        projected = self.kernel(padded, self.dim, seed, self.num_sms)[: len(values)]
        return projected.float() / (scale * math.sqrt(self.dim))


def _check_device(features: Tensor) -> None:
    if features.device.type != "cuda":
        raise AttributionError(
            f"FastJLProjector runs on CUDA devices only, but the gradients are on {features.device}. Use "
            "RademacherProjector, which runs on every device."
        )
