"""Logging of a run: CSV files in the run folder, and an MLflow run that mirrors it.

Only the files mlflow_*.py import MLflow. Files here may import `config` and `util`.
"""
