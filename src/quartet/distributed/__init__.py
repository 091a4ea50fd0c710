"""Processes: the only place that knows whether there is one or many."""

from quartet.distributed.choose import (
    CUTTING,
    SHARING_STATE,
    Travel,
    engine_name,
    gathers_for_rollout,
    refuse_impossible,
)
from quartet.distributed.engine import (
    BackboneWeights,
    ProcessEngine,
    SingleProcess,
    WeightKeeper,
    WholeWeights,
    is_share,
)
from quartet.distributed.launch import joined
from quartet.distributed.pieces import Piece

__all__ = [
    "CUTTING",
    "BackboneWeights",
    "SHARING_STATE",
    "Piece",
    "ProcessEngine",
    "SingleProcess",
    "Travel",
    "WeightKeeper",
    "WholeWeights",
    "engine_name",
    "gathers_for_rollout",
    "is_share",
    "joined",
    "refuse_impossible",
]
