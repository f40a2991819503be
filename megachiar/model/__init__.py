"""The model: ``build_model`` makes it, ``ChiarFormer`` is it."""

from megachiar.model.kv_cache import DecodingCache
from megachiar.model.layer_stack import RoutingStatistics
from megachiar.model.transformer import ChiarFormer, ModelOutput, build_model

__all__ = ["ChiarFormer", "DecodingCache", "ModelOutput", "RoutingStatistics", "build_model"]
