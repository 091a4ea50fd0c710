"""Processes: the only place that knows whether there is one or many."""

from quartet.distributed.engine import ProcessEngine, SingleProcess, start_engine

__all__ = ["ProcessEngine", "SingleProcess", "start_engine"]
