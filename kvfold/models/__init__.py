"""The decoder and its config. Importing this package makes transformers' Auto classes know model_type `kvfold`."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM, FoldModel

AutoConfig.register(FoldConfig.model_type, FoldConfig, exist_ok=True)
AutoModel.register(FoldConfig, FoldModel, exist_ok=True)
AutoModelForCausalLM.register(FoldConfig, FoldForCausalLM, exist_ok=True)
