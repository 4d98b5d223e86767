"""Where the numbers of a run go: CSV files in the run folder, and an MLflow run that mirrors it.

Only the files mlflow_*.py import MLflow. Imports `config` and `util`.
"""
