"""What `methods.py --tune` found best on the `tune` subsets, by row and network."""

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
    "IF explicit (Hessian), captum": {"lr": {"hessian_reg": 1e-3}},
    "IF CG (Hessian), dattri": {"lr": {"max_iter": 40}},
    "IF CG, ours": {"mlp": {"damping": 10.0}, "cnn": {"damping": 10.0}},
    "IF CG, dattri": {"mlp": {"regularization": 0.03}, "cnn": {"regularization": 0.03}},
    "IF LiSSA, ours": {"lr": {"damping": 0.01}, "mlp": {"damping": 3.0}, "cnn": {"damping": 3.0}},
    "IF LiSSA, dattri": {
        "lr": {"scaling": 10.0, "damping": 0.0},
        "mlp": {"scaling": 10.0, "damping": 0.0},
        "cnn": {"scaling": 10.0, "damping": 0.0},
    },
    "IF Arnoldi, ours": {"lr": {"damping": 0.1}, "mlp": {"damping": 3.0}, "cnn": {"damping": 3.0}},
    "IF Arnoldi, dattri": {
        "lr": {"regularization": 0.001},
        "mlp": {"regularization": 0.01},
        "cnn": {"regularization": 0.01},
    },
    "IF Arnoldi, captum": {
        "lr": {"hessian_reg": 1e-2},
        "mlp": {"hessian_reg": 1e-2},
        "cnn": {"hessian_reg": 1e-2},
    },
    "DataInf, ours": {"lr": {"damping": 0.01}, "mlp": {"damping": 0.01}, "cnn": {"damping": 0.01}},
    "DataInf, dattri": {
        "lr": {"regularization": 0.001},
        "mlp": {"regularization": 0.001},
        "cnn": {"regularization": 0.001},
    },
    "K-FAC, ours": {"lr": {"damping": 0.1}, "mlp": {"damping": 0.1}, "cnn": {"damping": 0.03}},
    "K-FAC, kronfluence": {"lr": {"damping": None}, "mlp": {"damping": None}, "cnn": {"damping": None}},
    "EK-FAC, ours": {"lr": {"damping": 0.03}, "mlp": {"damping": 0.03}, "cnn": {"damping": 0.03}},
    "EK-FAC, one run, ours": {"lr": {"damping": 0.03}, "mlp": {"damping": 0.03}, "cnn": {"damping": 0.01}},
    "EK-FAC, kronfluence": {"lr": {"damping": None}, "mlp": {"damping": None}, "cnn": {"damping": None}},
    "EK-FAC, dattri": {"lr": {"damping": 0.01}, "mlp": {"damping": 0.01}, "cnn": {"damping": 0.01}},
    "LoGra, ours": {"lr": {"damping": 0.3}, "mlp": {"damping": 0.3}, "cnn": {"damping": 1.0}},
    "LoGra, dattri": {"lr": {"damping": 0.1}, "mlp": {"damping": 0.1}, "cnn": {"damping": 0.3}},
    "FactGraSS, ours": {"lr": {"damping": 0.3}, "mlp": {"damping": 0.3}, "cnn": {"damping": 1.0}},
    "FactGraSS, dattri": {"lr": {"damping": 0.1}, "mlp": {"damping": 0.1}, "cnn": {"damping": 0.3}},
    "RPS, ours": {"lr": {"l2": 3e-4}, "mlp": {"l2": 3e-3}, "cnn": {"l2": 3e-2}},
    "RPS, dattri": {"lr": {"l2": 3e-4}, "mlp": {"l2": 3e-3}, "cnn": {"l2": 3e-3}},
}
