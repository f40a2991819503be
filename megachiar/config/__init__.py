"""The config of a run is typed, frozen and checked; ``load_config`` reads it."""

from megachiar.config.errors import ConfigError, Problem
from megachiar.config.load import load_config, parse_config
from megachiar.config.model import ModelConfig
from megachiar.config.run import RunConfig

__all__ = ["ConfigError", "ModelConfig", "Problem", "RunConfig", "load_config", "parse_config"]
