"""Models: stacks of layers under one scan, the transformer, and patterns of layers."""

from ._patterns import interleave as interleave, mod_transformer as mod_transformer
from ._stack import LayerStack as LayerStack, MakeLayer as MakeLayer, stack_layers as stack_layers
from ._transformer import Transformer as Transformer, unstack_layers as unstack_layers
