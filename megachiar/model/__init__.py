"""CHIAR-Former and its attention-only baseline: ``build_model`` builds a ``ChiarFormer``."""

from megachiar.model.kv_cache import DecodingCache
from megachiar.model.layer_stack import RoutingStatistics
from megachiar.model.transformer import ChiarFormer, ModelOutput, build_model

__all__ = ["ChiarFormer", "DecodingCache", "ModelOutput", "RoutingStatistics", "build_model"]
