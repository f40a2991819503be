"""Trackers, which show a run's metrics in charts: TensorBoard, Weights & Biases, MLflow, trackio."""
