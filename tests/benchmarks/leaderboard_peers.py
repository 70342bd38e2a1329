"""Rows of bergson 2.5.1 on the leaderboard: on our model, our text and our recorded run, by its own pipelines.

    PYTHON tests/benchmarks/leaderboard_peers.py FOLDER ROW DAMPING FILE

`leaderboard.py --bergson PYTHON` calls it so, with the PYTHON of an environment that has bergson. It reads what
`export` has written into `FOLDER/peers`: the model at the start and at the snapshots, and the chunks as tokens.
Settings are its own defaults, or those that it publishes for its leaderboard; what differs here:

- EK-FAC, TRAK and the others see the linear layers without biases, as they do there; so they never see the embedding.
- CG: 20 steps on one batch of 256 chunks. TrackStar: projections of 32 x 32 per layer, of 64 x 64 there.
- TRAK: one model, 4,096 features. There it has no damping, here that is one of the dampings to choose from.
- SOURCE: three segments of two snapshots, in the form for Adam, with the second moments that our snapshots hold.
- MAGIC trains by itself, from the same weights, with the same batches in the same order (its own order is replaced),
  the same schedule, betas and epsilon, and its own epsilon under the root of 1e-17.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

TOKENS = 2048
"""Of a batch of bergson's."""

# Our side -------------------------------------------------------------------------------------------------------------


def export(run: Path, folder: Path) -> None:
    """Write models, optimizer states and chunks for bergson."""
    import torch
    from leaderboard_rows import queries
    from leaderboard_text import batches, load, network
    from transformers import PreTrainedTokenizerFast

    from lightning_attr import FeatureStore

    store, text = FeatureStore.open(run), load()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=text.tokenizer, bos_token="!", eos_token="!", pad_token="!")
    for snapshot in store.snapshots:
        model, place = network(0), folder / snapshot.key
        names = [f"network.{name}" for name, _ in model.named_parameters()]
        weights = store.weights(snapshot.key)
        with torch.no_grad():
            for name, parameter in zip(names, model.parameters(), strict=True):
                parameter.copy_(weights[name])
        lengthened(model).save_pretrained(place)
        tokenizer.save_pretrained(place)
        state = store.optimizer_state(snapshot.key)
        moments = {} if state is None else state.moments
        entries = {
            i: {"exp_avg_sq": moments[name].exp_avg_sq, "step": moments[name].step, "param_name": name[8:]}
            for i, name in enumerate(names)
            if name in moments
        }
        group = {"params": list(range(len(names))), "betas": (0.9, 0.999), "eps": 1e-6, "lr": 1e-3}
        torch.save({"state": entries, "param_groups": [group]}, place / "optimizer.pt")
    chunks = text.train.tolist()
    ordered = [(row, chunks[row]) for batch in batches(0) for row in batch]
    write(folder / "train.jsonl", [{"input_ids": chunk} for chunk in chunks])
    write(folder / "queries.jsonl", [{"input_ids": chunk} for chunk in queries().tolist()])
    write(folder / "ordered.jsonl", [{"input_ids": chunk, "doc_ids": [row] * len(chunk)} for row, chunk in ordered])
    about = {"snapshots": [snapshot.key for snapshot in store.snapshots], "n_train": len(chunks)}
    about["rates"] = [snapshot.learning_rate for snapshot in store.snapshots]
    about["steps"] = [snapshot.global_step for snapshot in store.snapshots]
    (folder / "about.json").write_text(json.dumps(about))


def lengthened(model: Any) -> Any:
    """Add positions that no chunk has: a batch may hold as many tokens as the model has positions, not more."""
    import torch

    positions = torch.zeros(TOKENS, model.config.n_embd)
    positions[: model.config.n_positions] = model.transformer.wpe.weight.detach()
    model.transformer.wpe = torch.nn.Embedding.from_pretrained(positions)
    model.config.n_positions = TOKENS
    return model


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


# Its side -------------------------------------------------------------------------------------------------------------


class Peer:
    """Runs bergson's pipelines on what was exported."""

    def __init__(self, folder: Path, name: str, damping: float) -> None:
        self.folder, self.damping = folder / "peers", damping
        self.about = json.loads((self.folder / "about.json").read_text())
        self.path = self.folder / "work" / f"{name}-{damping}"
        shutil.rmtree(self.path, ignore_errors=True)

    def config(self, kind: Any, **options: Any) -> Any:
        from bergson.config import config

        data = config.DataConfig(dataset=str(self.folder / "train.jsonl"))
        last = str(self.folder / self.about["snapshots"][-1])
        return kind(
            run_path=str(self.path), model=last, data=data, token_batch_size=TOKENS, max_batch_size=64, **options
        )

    @property
    def queries(self) -> Any:
        from bergson.config.config import QuerySetConfig

        return QuerySetConfig(dataset=str(self.folder / "queries.jsonl"), aggregation="none")

    def ekfac(self, steps: int = 0) -> None:
        from bergson.config import config
        from bergson.hessians.pipeline import hessian_pipeline

        refined = config.AstraConfig(num_steps=steps, solver="cg", batch_size=256, micro_batch_size=64)
        pipeline = config.HessianPipelineConfig(
            query=self.queries, inversion_cfg=config.InversionConfig(damping_factor=self.damping), astra=refined
        )
        hessian = config.HessianConfig(method="kfac", ev_correction=True)
        hessian_pipeline(
            self.config(config.IndexConfig), hessian, config.ScoreConfig(), config.PreprocessConfig(), pipeline
        )

    def cg(self) -> None:
        self.ekfac(20)

    def source(self) -> None:
        from bergson.approx_unrolling.pipeline import approx_unrolling_pipeline
        from bergson.config import config

        last = self.about["snapshots"][1:]
        steps = [0, *self.about["steps"][1:]]
        spans = [b - a for a, b in pairwise(steps)]
        rates = self.about["rates"][1:]
        pairs = range(0, len(last), 2)
        unrolling = config.ApproxUnrollingConfig(
            checkpoints=[str(self.folder / key) for key in last],
            model_path=str(self.folder / last[-1]),
            segments=len(last) // 2,
            lr_list=[sum(rates[i : i + 2]) / sum(spans[i : i + 2]) for i in pairs],
            step_size_list=[sum(spans[i : i + 2]) for i in pairs],
            use_adam_preconditioner=True,
            inversion_cfg=config.InversionConfig(damping_factor=self.damping),
            query=self.queries,
        )
        hessian = config.HessianConfig(method="kfac", ev_correction=True)
        approx_unrolling_pipeline(self.config(config.IndexConfig), hessian, unrolling)

    def trackstar(self) -> None:
        from bergson.cli.trackstar import trackstar
        from bergson.config import config

        preprocess = config.PreprocessConfig(
            unit_normalize=True, inversion_cfg=config.InversionConfig(damping_factor=self.damping)
        )
        options = config.TrackstarConfig(query=self.queries, preprocess_cfg=preprocess, mix_hessians=False)
        trackstar(self.config(config.TrackstarIndexConfig, projection_dim=32), options)

    def trak(self) -> None:
        from bergson.cli.trak import trak
        from bergson.config import config

        preprocess = config.PreprocessConfig(inversion_cfg=config.InversionConfig(damping_factor=self.damping))
        options = config.TrakConfig(query=self.queries, preprocess_cfg=preprocess)
        index = self.config(config.TrackstarIndexConfig, projection_dim=4096, projection_target="global")
        index.loss_fn = "log_odds"
        trak(index, options)

    def magic(self) -> None:
        import bergson.magic.cli as magic
        from bergson.config import config
        from bergson.magic.config import MagicConfig

        magic.shuffled_epochs = lambda dataset, seed, num_epochs: dataset  # the order of the file
        schedule = config.LRScheduleConfig(lr=1e-3, lr_scheduler_type="linear", lr_start=1e-4, warmup_steps=10)
        magic.run_magic(
            MagicConfig(
                run_path=str(self.path),
                model=str(self.folder / self.about["snapshots"][0]),
                data=config.DataConfig(dataset=str(self.folder / "ordered.jsonl")),
                query=self.queries,
                batch_size=64,
                lr_schedule=schedule,
                adam_beta1=0.9,
                adam_beta2=0.999,
                adam_eps=1e-6,
                weight_decay=0.01,
                wandb_project="",
            )
        )

    def scores(self) -> Any:
        from bergson.data import load_scores_loss_signed

        scores, _ = load_scores_loss_signed(str(self.path / "scores"))  # negative where a chunk lowers the loss
        return -scores.reshape(len(scores), -1)[: self.about["n_train"]]


ROWS = {
    "bergson EK-FAC": ("ekfac", (0.01, 0.1, 1.0, 10.0)),
    "bergson EK-FAC + CG": ("cg", (0.1, 1.0, 10.0)),
    "bergson SOURCE": ("source", (0.1,)),
    "bergson TrackStar": ("trackstar", (0.01, 0.1, 1.0)),
    "bergson TRAK, 1 model": ("trak", (0.0, 0.1, 1.0)),
    "bergson MAGIC": ("magic", (0.0,)),
}


def main() -> None:
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    folder, name, damping, written = Path(sys.argv[1]).absolute(), sys.argv[2], float(sys.argv[3]), sys.argv[4]
    peer = Peer(folder, ROWS[name][0], damping)
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    getattr(peer, ROWS[name][0])()
    seconds = time.process_time() - begin
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    costs = torch.tensor([seconds, grown], dtype=torch.float32)
    save_file({"scores": peer.scores().float().contiguous(), "costs": costs}, written)


if __name__ == "__main__":
    main()
