"""The known bugs of inference engines, each as a small change to one kind of step of the reference.

A fault is a function from the state and the step's name to what a buggy engine would have computed there. Its
docstring says what usually causes it, and is what `diagnose` tells the user. `diagnose` and the tests pick up
whatever is registered here; adding a bug means adding one function to its family's file.

A fault that comes in sizes (the wrong RoPE base, the bias of some other layer) lists its `values`; each is
tried. Faults marked `harmless` are what healthy engines do to numbers (rounding to f16, bf16 or int8): they
explain noise and are never a diagnosis.
"""

from ggufkit.runtime.faults import activations as activations  # each import fills the registry
from ggufkit.runtime.faults import attention as attention
from ggufkit.runtime.faults import biases as biases
from ggufkit.runtime.faults import blocks as blocks
from ggufkit.runtime.faults import cache as cache
from ggufkit.runtime.faults import norms as norms
from ggufkit.runtime.faults import numbers as numbers
from ggufkit.runtime.faults import positions as positions
from ggufkit.runtime.faults import weights as weights
from ggufkit.runtime.faults.registry import FAULTS, Fault, Variant, fault

__all__ = ["FAULTS", "Fault", "Variant", "fault"]
