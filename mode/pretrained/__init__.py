"""Pretrained models: loaded from public formats, routed, and saved again.

`load` reads Llama, SmolLM2, Mistral, Qwen and GPT-2 models, `convert` gives some of their layers
routers without changing what they compute, `compare` says what a conversion changed, and `save`
writes dense models for other libraries. `pip install 'mode-jax[pretrained]'` brings what they need.
"""

from ._config import Config as Config
from ._convert import NormedScorer as NormedScorer, convert as convert
from ._files import load as load, load_shapes as load_shapes, save as save
from ._forms import FORMS as FORMS, Form as Form, FormOptions as FormOptions
from ._receipt import Receipt as Receipt, compare as compare
from ._tokenizer import load_tokenizer as load_tokenizer
