"""Layers of training and decoding steps on a CPU, compiled from C where a compiler was there at installation.

A function says False or gives None where the kernels are not there or do not fit its tensors: the caller then computes with
torch's operations.
"""

from quartet.kernels.attending import attention, attention_fits, attention_gradient
from quartet.kernels.decoding import FEW, Decoding, Layer, Linear, alike, decodes, few_rows
from quartet.kernels.drawing import draw
from quartet.kernels.elementwise import (
    add,
    norms,
    rms_norm,
    rms_norm_gradient,
    rotary,
    rotary_fits,
    silu_gradient,
    silu_product,
)
from quartet.kernels.multiplying import Term, is_intel, multiplies, multiplies_alone, multiply
from quartet.kernels.softmax import exponentials, slopes
from quartet.kernels.squares import norm_of_all
from quartet.kernels.stretch import Live, Responses, Stretch, stretches
from quartet.kernels.threads import more_threads
from quartet.kernels.waiting import caught_up, together

__all__ = [
    "FEW",
    "Decoding",
    "Layer",
    "Linear",
    "Live",
    "Responses",
    "Stretch",
    "Term",
    "add",
    "alike",
    "attention",
    "attention_fits",
    "attention_gradient",
    "caught_up",
    "decodes",
    "draw",
    "exponentials",
    "few_rows",
    "is_intel",
    "more_threads",
    "multiplies",
    "multiplies_alone",
    "multiply",
    "norm_of_all",
    "norms",
    "rms_norm",
    "rms_norm_gradient",
    "rotary",
    "rotary_fits",
    "silu_gradient",
    "silu_product",
    "slopes",
    "stretches",
    "together",
]
