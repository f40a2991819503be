"""The sections below ``logging:`` that send a run's metrics to trackers; each is off where it is null."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megachiar.config.section import Section

Name = Annotated[str, Field(min_length=1)]


class WandbConfig(Section):
    """Weights & Biases; needs `pip install 'megachiar[wandb]'`. The key is that of `wandb login` or WANDB_API_KEY."""

    project: Name = "megachiar"
    """Project that the run belongs to."""
    entity: Name | None = None
    """User or team that the project belongs to; null: the default of the account."""
    name: Name | None = None
    """Name of the run in charts; null: the name of the run folder."""
    group: Name | None = None
    """Group that the run is shown in, such as the seeds of one variant; null: none."""
    tags: tuple[Name, ...] = ()
    """Words that runs are found by."""
    mode: Literal["online", "offline"] = "online"
    """online: sent while the run goes on. offline: kept in RUN/wandb until `wandb sync RUN/wandb/offline-run-*` sends
    it, for machines without a network."""


class MlflowConfig(Section):
    """MLflow; needs `pip install 'megachiar[mlflow]'`."""

    tracking_uri: Name | None = None
    """Where MLflow keeps its runs: the address of a server, such as http://host:5000, or of a database, such as
    sqlite:////data/mlflow.db. null: the database RUN/mlflow.db."""
    experiment: Name = "megachiar"
    """Experiment that the run belongs to."""
    name: Name | None = None
    """Name of the run; null: the name of the run folder."""


class TrackioConfig(Section):
    """trackio, a tracker on this machine; needs `pip install 'megachiar[trackio]'`. `trackio show` draws the charts."""

    project: Name = "megachiar"
    """Project that the run belongs to. trackio keeps it below TRACKIO_DIR, or else in the cache of Hugging Face."""
    name: Name | None = None
    """Name of the run; null: the name of the run folder."""
