"""The figures and tables of a result: who helps and who hurts, how suspicious training samples are, what is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_attr.arguments.checks import check_choice, check_int
from lightning_attr.metrics import data_selection, datamodeling, noisy_labels, plotting
from lightning_attr.results.extremes import extremes
from lightning_attr.results.score_matrix import ScoreMatrix
from lightning_attr.results.text_table import text_table
from lightning_attr.results.top_scores import TopScores


class ResultFigures:
    """What :class:`lightning_attr.AttributionResult` draws of itself."""

    scores: ScoreMatrix | TopScores
    self_influence: Tensor
    loss: Tensor
    labels: Tensor | None
    noise_mask: Tensor | None

    def plot(self, kind: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Draw a figure by its name.

        ================  =========================================================================================
        kind              figure, and the arguments it takes beside ``ax``
        ================  =========================================================================================
        "scores"          :meth:`plot_scores`
        "self_influence"  :meth:`plot_self_influence`
        "detection"       :meth:`plot_detection`
        "precision"       :meth:`plot_precision`
        "proponents"      :meth:`plot_proponents`: images of training samples and targets, and which targets
        "selection"       :func:`lightning_attr.metrics.plot_selection_curve`: the curve of retrained models
        "cost"            :func:`lightning_attr.metrics.plot_datamodeling_score_against_cost`: the rows of all methods
        ================  =========================================================================================

        The last two show what retraining gave, which a result alone does not know.

        Args:
            kind: one of these.
            *args: passed on.
            **kwargs: passed on, such as ``ax``.

        Returns:
            ``(figure, axes)``.

        Raises:
            ValueError: if there is no such figure, or the result lacks what it shows.

        Example:
            >>> import torch
            >>> import torch
            >>> from lightning_attr import AttributionResult
            >>> from lightning_attr.results import ScoreMatrix
            >>> result = AttributionResult(ScoreMatrix(torch.eye(3)), torch.ones(3), torch.ones(3))
            >>> figure, axes = result.plot("scores")
            >>> axes.get_xlabel()
            'target'
        """
        figures: dict[str, Callable[..., tuple[Any, Any]]] = {
            "scores": self.plot_scores,
            "self_influence": self.plot_self_influence,
            "detection": self.plot_detection,
            "precision": self.plot_precision,
            "proponents": self.plot_proponents,
            "selection": data_selection.plot_selection_curve,
            "cost": datamodeling.plot_datamodeling_score_against_cost,
        }
        check_choice("AttributionResult.plot", "kind", kind, figures)
        return figures[kind](*args, **kwargs)

    def plot_scores(self, ax: Any = None) -> tuple[Any, Any]:
        """Draw the score matrix as a heat map.

        Args:
            ax: matplotlib axes to draw on; new ones by default.

        Returns:
            ``(figure, axes)``.

        Raises:
            AttributionError: if the result was computed with ``topk``.
        """
        return plotting.plot_score_heatmap(self.scores.values, ax=ax)

    def plot_self_influence(self, ax: Any = None) -> tuple[Any, Any]:
        """Draw the distribution of self-influence, with the known label noise marked.

        Args:
            ax: matplotlib axes to draw on; new ones by default.

        Returns:
            ``(figure, axes)``.
        """
        return plotting.plot_self_influence(self.self_influence, self.noise_mask, ax=ax)

    def plot_detection(self, ax: Any = None) -> tuple[Any, Any]:
        """Draw the share of flipped labels found against the share of samples inspected.

        Args:
            ax: matplotlib axes to draw on; new ones by default.

        Returns:
            ``(figure, axes)``.

        Raises:
            ValueError: if there is no noise mask.
        """
        return noisy_labels.plot_recall_curve(self._suspicion(), self._known_noise("detection"), ax=ax)

    def plot_precision(self, ax: Any = None) -> tuple[Any, Any]:
        """Draw the share of flipped labels among the samples inspected against the share inspected.

        Args:
            ax: matplotlib axes to draw on; new ones by default.

        Returns:
            ``(figure, axes)``.

        Raises:
            ValueError: if there is no noise mask.
        """
        return noisy_labels.plot_precision_curve(self._suspicion(), self._known_noise("precision"), ax=ax)

    def plot_proponents(
        self, train_images: Any, target_images: Any, targets: Sequence[int], k: int = 5, width: float | None = None
    ) -> tuple[Any, Any]:
        """Draw targets beside their strongest proponents and opponents, for image data.

        Args:
            train_images: ``train_images[i]`` is the image of ``dataset[i]``, ``(H, W)``, ``(C, H, W)`` or
                ``(H, W, C)``.
            target_images: the same for targets.
            targets: columns of the score matrix, a row of the figure each.
            k: proponents, and as many opponents.
            width: of the figure, in inches; by default 1.05 an image. A column of a paper, 3.3 inches, has room for
                ``k=2``.

        Returns:
            ``(figure, axes)``.
        """
        rows = []
        for index, samples in extremes(self.scores, targets, k):
            row = [(target_images[index], f"#{index}")]
            row += [(train_images[i], f"{self._label(i)}\n{score:+.2g}") for i, score in samples]
            rows.append(row)
        return plotting.plot_image_grid(rows, opponents=k, width=width)

    def proponent_texts(
        self, train_texts: Any, target_texts: Any, targets: Sequence[int], k: int = 5, width: int = 100
    ) -> str:
        """Write targets above their strongest proponents and opponents, for text data.

        Args:
            train_texts: ``train_texts[i]`` is the text of ``dataset[i]``.
            target_texts: the same for targets.
            targets: columns of the score matrix.
            k: proponents, and as many opponents, the strongest opponent last.
            width: characters per line; longer texts are cut.

        Returns:
            A table to print.

        Example:
            >>> import torch
            >>> import torch
            >>> from lightning_attr import AttributionResult
            >>> from lightning_attr.results import ScoreMatrix
            >>> result = AttributionResult(ScoreMatrix(torch.tensor([[0.5], [-2.0]])), torch.ones(2), torch.ones(2))
            >>> print(result.proponent_texts(["It rains.", "The sun shines."], ["It pours."], targets=[0], k=1))
            target #0  It pours.
              +0.500   #0  It rains.
               -2.00   #1  The sun shines.
        """
        rows = []
        for index, samples in extremes(self.scores, targets, k):
            shown = [(score, self._label(i), train_texts[i]) for i, score in samples]
            rows.append((f"#{index}", target_texts[index], shown))
        return text_table(rows, check_int("proponent_texts", "width", width))

    def _suspicion(self) -> dict[str, Tensor]:
        return {"self-influence": self.self_influence, "training loss": self.loss}

    def _known_noise(self, curve: str) -> Tensor:
        if self.noise_mask is None:
            raise ValueError(
                f"Expected a noise mask for the {curve} curve, but this result has none: pass `noise_mask`."
            )
        return self.noise_mask

    def _label(self, index: int) -> str:
        if self.labels is None:
            return f"#{index}"
        return f"#{index}: “{int(self.labels[self.scores.train_indices == index])}”"
