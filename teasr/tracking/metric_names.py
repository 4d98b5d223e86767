"""The names of the metrics in MLflow, where a slash groups the charts; metrics.csv and timing.csv keep their own."""

from __future__ import annotations

NAMES = {  # column of metrics.csv or timing.csv -> name in MLflow
    "loss": "loss/total",
    "flow": "loss/flow",
    "cons": "loss/consistency",
    "adv": "loss/adversarial",
    "rectify": "loss/rectification",
    "mse": "loss/mse",
    "lpips": "loss/lpips",
    "grid": "loss/grid",
    "dists": "loss/dists",
    "ea_dists": "loss/ea_dists",
    "disc": "loss/discriminator",
    "nll": "loss/nll",
    "restart": "loss/restart",
    "restart_mse": "loss/restart_mse",
    "restart_lpips": "loss/restart_lpips",
    "restart_grid": "loss/restart_grid",
    "grad_norm": "gradient/norm",
    "rectify_to_data": "gradient/rectification_to_data",
    "adv_to_pixels": "gradient/adversarial_to_pixels",
    "learning_rate": "optimiser/learning_rate",
    "skipped": "optimiser/skipped",
    "bad_samples": "data/bad_samples",
    "z_hat_mean": "latents/one_step_mean",
    "z_hat_std": "latents/one_step_deviation",
    "log_sd": "latents/log_deviation",
    "score_difference": "latents/score_difference",
    "checkerboard": "pictures/checkerboard",
    "restart_checkerboard": "pictures/restart_checkerboard",
    "update_s": "time/update_s",
    "cpu_s": "time/cpu_s",
    "data_wait_s": "time/data_wait_s",
    "preview_s": "time/preview_s",
    "images_per_s": "time/images_per_s",
    "peak_memory_gib": "memory/peak_gib",
}
GROUPS = {"grad_norm/": "gradient/norm_"}  # beginning of a column -> beginning of the name
KEPT = ("preview/", "system/")  # MLflow shows system/.. on a page of its own
LEGEND = {  # group -> what it holds, for the description of a run
    "loss": "what is minimised: `loss/total` and its parts, each before its weight",
    "preview": "scores of the preview pictures, by number of steps",
    "gradient": "norm before clipping, and the share of one loss",
    "optimiser": "learning rate and skipped updates",
    "latents": "statistics of the one-step results",
    "pictures": "artefacts of the one-step results",
    "data": "samples that could not be read",
    "time": "seconds of an update, of waiting for data, and of previews",
    "memory": "most GPU memory so far",
    "method": "further values of the method",
}


def mlflow_name(column: str) -> str:
    """Return the name in MLflow of a column; what a method logs under a name of its own is below `method/`."""
    if column in NAMES:
        return NAMES[column]
    for start, new in GROUPS.items():
        if column.startswith(start):
            return new + column.removeprefix(start)
    return column if column.startswith(KEPT) else f"method/{column}"
