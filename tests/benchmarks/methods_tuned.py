"""The settings of the rows of `methods.py`: what `--tune` found best on the `tune` subsets, for a sixth of the targets.

A row or network that is missing has no setting, or the default of its library, as `--tune` would take minutes there.
"As on ..." marks what was taken over from another network or row, not tuned. TRAK from dattri, K-FAC and EK-FAC from
dattri and kronfluence, Arnoldi, LoGra and FactGraSS are tuned for their authors as they are for us.
"""

from __future__ import annotations

from typing import Any

TUNED: dict[str, dict[str, dict[str, Any]]] = {
    "TRAK, one model, ours": {"lr": {"damping": 0.3}, "mlp": {"damping": 1.0}, "cnn": {"damping": 3.0}},
    "TRAK, one model, dattri": {
        "lr": {"regularization": 1e-2},
        "mlp": {"regularization": 0.1},
        "cnn": {"regularization": 1.0},
    },
    "TRAK, one run, ours": {"lr": {"damping": 0.3}, "mlp": {"damping": 1.0}, "cnn": {"damping": 1.0}},
    "TRAK, one run, dattri": {
        "lr": {"regularization": 1e-2},
        "mlp": {"regularization": 1e-2},
        "cnn": {"regularization": 0.1},
    },
    "TRAK, one run from the start, ours": {
        "lr": {"damping": 0.3},
        "mlp": {"damping": 1.0},  # as without the start
        "cnn": {"damping": 1.0},  # as without the start
    },
    "TRAK, exact, one model, ours": {"lr": {"damping": 1.0}, "mlp": {"damping": 1.0}, "cnn": {"damping": 3.0}},
    "TRAK, exact, one run, ours": {"lr": {"damping": 1.0}, "mlp": {"damping": 1.0}, "cnn": {"damping": 1.0}},
    "TRAK, exact, one run from the start, ours": {
        "lr": {"damping": 1.0},
        "mlp": {"damping": 1.0},
        "cnn": {"damping": 1.0},
    },
    "TRAK + EK-FAC, one run from the start, ours": {
        "lr": {"trak": 1.0, "ekfac": 0.1},
        "mlp": {"trak": 0.3, "ekfac": 0.1},
        "cnn": {"trak": 1.0, "ekfac": 0.03},
    },
    "IF explicit (Hessian), captum": {"lr": {"hessian_reg": 1e-3}},
    "IF CG (Hessian), dattri": {"lr": {"max_iter": 40}},
    "IF CG, ours": {"mlp": {"damping": 10.0}},
    "IF CG, dattri": {"mlp": {"regularization": 0.03}},  # not tuned: close to ours
    "IF LiSSA, ours": {"lr": {"damping": 0.01}},
    "IF LiSSA, dattri": {
        "lr": {"scaling": 10.0, "damping": 0.0},
        "mlp": {"scaling": 10.0, "damping": 0.0},  # as on lr
    },
    "IF Arnoldi, ours": {"lr": {"damping": 0.1}, "mlp": {"damping": 3.0}},
    "IF Arnoldi, dattri": {
        "lr": {"regularization": 0.001},
        "mlp": {"regularization": 0.01},
    },
    "IF Arnoldi, captum": {"lr": {"hessian_reg": 1e-2}},
    "DataInf, ours": {"lr": {"damping": 0.01}, "mlp": {"damping": 0.01}, "cnn": {"damping": 0.01}},  # cnn as on mlp
    "DataInf, dattri": {
        "lr": {"regularization": 0.001},
        "mlp": {"regularization": 0.001},
        "cnn": {"regularization": 0.001},  # as on mlp
    },
    "K-FAC, ours": {"lr": {"damping": 0.1}, "mlp": {"damping": 0.3}, "cnn": {"damping": 0.1}},
    "K-FAC, kronfluence": {"lr": {"damping": None}, "mlp": {"damping": None}, "cnn": {"damping": None}},
    "EK-FAC, ours": {"lr": {"damping": 0.03}, "mlp": {"damping": 0.1}, "cnn": {"damping": 0.1}},
    "EK-FAC, one run, ours": {"lr": {"damping": 0.03}, "mlp": {"damping": 0.1}, "cnn": {"damping": 0.03}},
    "EK-FAC, kronfluence": {"lr": {"damping": None}, "mlp": {"damping": None}, "cnn": {"damping": None}},
    "EK-FAC, dattri": {"lr": {"damping": 0.001}, "mlp": {"damping": 0.001}, "cnn": {"damping": 0.001}},
    "LoGra, ours": {"lr": {"damping": 0.3}, "mlp": {"damping": 0.3}, "cnn": {"damping": 1.0}},
    "LoGra, dattri": {"lr": {"damping": 0.3}, "mlp": {"damping": 0.3}, "cnn": {"damping": 0.3}},  # cnn as on mlp
    "LoGra, linear layers, ours": {"cnn": {"damping": 3.0}},
    "FactGraSS, linear layers, ours": {"cnn": {"damping": 1.0}},
    "FactGraSS, ours": {"lr": {"damping": 0.3}, "mlp": {"damping": 0.3}, "cnn": {"damping": 1.0}},
    "FactGraSS, dattri": {"lr": {"damping": 1.0}, "mlp": {"damping": 1.0}, "cnn": {"damping": 1.0}},  # cnn as on mlp
    "RPS, ours": {"lr": {"l2": 3e-4}, "mlp": {"l2": 3e-3}, "cnn": {"l2": 3e-2}},
    "RPS, dattri": {"lr": {"l2": 3e-4}, "mlp": {"l2": 3e-2}, "cnn": {"l2": 3e-2}},  # cnn as on mlp
}
