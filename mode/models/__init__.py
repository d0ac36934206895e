"""Models: stacks of layers under one scan, the transformer, and patterns of layers."""

from ._cast import cast_parameters as cast_parameters
from ._patterns import interleave as interleave, mod_transformer as mod_transformer
from ._restack import (
    list_layers as list_layers,
    unstack_layers as unstack_layers,
    with_layers as with_layers,
)
from ._stack import LayerStack as LayerStack, MakeLayer as MakeLayer, stack_layers as stack_layers
from ._transformer import Transformer as Transformer
