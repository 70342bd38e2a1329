"""Attribution methods, one file each."""

from lightning_attr.methods.base import AttributionMethod, ScoreBlock, SnapshotFeatures, in_step
from lightning_attr.methods.cache import CacheKey, SnapshotCache
from lightning_attr.methods.datamodel import Datamodel, EmpiricalInfluence
from lightning_attr.methods.dropout import DropoutEnsemble
from lightning_attr.methods.grad import GradCos, GradDot
from lightning_attr.methods.influence import Influence
from lightning_attr.methods.knn_shapley import KNNShapley
from lightning_attr.methods.less import LESS
from lightning_attr.methods.magic import MAGIC
from lightning_attr.methods.projected_influence import FactGraSS, LoGra, ProjectedInfluence
from lightning_attr.methods.projected_source import ProjectedSOURCE
from lightning_attr.methods.representation import RepresentationSimilarity
from lightning_attr.methods.representer import RPS
from lightning_attr.methods.soft_threshold import SoftThreshold, soft_threshold
from lightning_attr.methods.solvers.astra import Astra
from lightning_attr.methods.solvers.base import Arnoldi, Explicit, Solver
from lightning_attr.methods.solvers.iterative import ConjugateGradient, LiSSA
from lightning_attr.methods.solvers.layerwise import EKFAC, KFAC, DataInf
from lightning_attr.methods.source import SOURCE
from lightning_attr.methods.support.damping import DampedMethod, choose_damping
from lightning_attr.methods.support.module_method import ModelMethod, model_of
from lightning_attr.methods.tracin import GAS, TracIn
from lightning_attr.methods.trackstar import TrackStar
from lightning_attr.methods.trajectory_influence import TrajectoryInfluence
from lightning_attr.methods.trak import TRAK

__all__ = [
    "EKFAC",
    "GAS",
    "KFAC",
    "LESS",
    "MAGIC",
    "RPS",
    "SOURCE",
    "TRAK",
    "Arnoldi",
    "Astra",
    "AttributionMethod",
    "CacheKey",
    "ConjugateGradient",
    "DampedMethod",
    "DataInf",
    "Datamodel",
    "DropoutEnsemble",
    "EmpiricalInfluence",
    "Explicit",
    "FactGraSS",
    "GradCos",
    "GradDot",
    "Influence",
    "KNNShapley",
    "LiSSA",
    "LoGra",
    "ModelMethod",
    "ProjectedInfluence",
    "ProjectedSOURCE",
    "RepresentationSimilarity",
    "ScoreBlock",
    "SnapshotCache",
    "SnapshotFeatures",
    "SoftThreshold",
    "Solver",
    "TracIn",
    "TrackStar",
    "TrajectoryInfluence",
    "choose_damping",
    "in_step",
    "model_of",
    "soft_threshold",
]
