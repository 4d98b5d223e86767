"""Training: the loop (trainer.py), one update (update.py), DeepSpeed (engine.py), checkpoints, previews, the dry run.

Only engine.py imports DeepSpeed. The code is independent of the method and the backbone of a run. It may import
everything except `restore` and `evaluation`.
"""
