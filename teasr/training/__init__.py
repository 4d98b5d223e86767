"""Training: the loop (trainer.py), one update (update.py), DeepSpeed (engine.py, the only file that imports it), checkpoints, previews, the dry run.

It knows neither the method nor the backbone of a run. It may import everything but `restore` and `evaluation`.
"""
