"""Mixture-of-Depths, expert-choice Mixture-of-Experts and MoDE, as Equinox layers.

- `mode.nn`: blocks, which return an update of the residual stream (`TransformerBlock`,
  `MixtureOfExperts`, `Delta` around a module of yours), and the layers that add it, `Residual` and
  `MixtureOfDepths`. MoDE by name: `staged_mode_layer`, `integrated_mode_layer`.
- `mode.routing`: a `Router` of a selector, a gate and perhaps a `Predictor` makes a `Routing`,
  which `dispatch`, `combine`, the losses and the metrics read. `update_router_state` follows each
  training step; `make_causal` makes the model that may generate.
- `mode.models`: stacks of layers. `mode.decoding`: generation. `mode.parallel`: sharding.
  `mode.flops`: operations. `mode.testing`: checks of what you composed. `mode.aot`: compilers of
  devices that are not there.

Names are imported at their first use, from the places that `__init__.pyi` gives. What needs no JAX,
such as `mode-lab --help`, does not wait for it.
"""

import importlib.metadata

import lazy_loader


__version__ = importlib.metadata.version("mode-jax")
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
