"""Processes: the only place that knows whether there is one or many."""

from quartet.distributed.choose import engine_name
from quartet.distributed.engine import ProcessEngine, SingleProcess, WeightKeeper, WholeWeights
from quartet.distributed.launch import joined
from quartet.distributed.pieces import Piece

__all__ = ["Piece", "ProcessEngine", "SingleProcess", "WeightKeeper", "WholeWeights", "engine_name", "joined"]
