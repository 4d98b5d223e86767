"""The model card of a saved model: README.md with the header that the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Mapping

from teasr.run_config import RunConfig


def card(name: str, config: RunConfig, parameters: int, origin: Mapping[str, object]) -> str:
    """Return the text of the card.

    name: of the model. parameters: number of stored weights. origin: what else is known, such as the number of updates
    and the commit of teasr.
    """
    what = f"restores pictures and enlarges them {config.scale} times" if config.scale > 1 else "restores pictures"
    shards = [config.data.shards] if isinstance(config.data.shards, str) else list(config.data.shards)
    rows = {
        "network": f"`{config.backbone_name}`, {parameters / 1e6:.1f} M weights",
        "method": f"`{config.method_name}`",
        "scale": str(config.scale),
        "training data": ", ".join(f"`{shard}`" for shard in shards),
        "batch, learning rate": f"{config.train.batch}, {config.train.learning_rate:g}",
        **{key: str(value) for key, value in origin.items()},
    }
    if config.train.start_from:
        rows["started from"] = f"`{config.train.start_from}`"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
library_name: teasr
pipeline_tag: image-to-image
tags: [super-resolution, image-restoration, {config.method_name}, {config.backbone_name}]
---

# {name}

A model of `teasr` that {what}.

    teasr upscale photo.jpg -o restored.png --model {name}

```python
from teasr import Upscaler

Upscaler.from_pretrained("{name}")("photo.jpg").save("restored.png")
```

`{name}` stands for this folder, or for `owner/name` on the hub.

| | |
|---|---|
{table}

All settings of the training are in `config.yaml`. The rights of the training pictures, and a licence for these weights,
are for whoever publishes them to state here. The model invents detail: do not use what it adds as evidence.
"""
