"""Names of the files that a training leaves in its run folder beside the checkpoints."""

METRICS, TIMING = "metrics.csv", "timing.csv"  # functions of the run alone; what differs between equal runs
RUN_FILE = "mlflow_run.json"  # {URI of a store: id of the run there}
PARAMS_FILE = "parameters.json"
STATUS_FILE = "status"  # RUNNING, FINISHED, FAILED or KILLED, as MLflow has them
SKIPPED_FILE = "skipped_updates.txt"  # updates that were not finite, and where
BAD_FILE = "bad_samples.txt"  # what the reader had to pass over, one a line
FILES = ("config.yaml", "environment.txt", BAD_FILE, SKIPPED_FILE)  # of the run folder, as artifacts
PREVIEWS, PREVIEW = "previews", "update-{:08d}.png"
