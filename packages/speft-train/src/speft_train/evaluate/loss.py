"""Mean loss on held-out answers."""

from __future__ import annotations

import math
from typing import Any

import torch
from tqdm import tqdm

from ..data.collate import Collator
from ..data.tokens import IGNORED, TokenDataset
from .batches import batches


def held_out_loss(
    model: torch.nn.Module,
    dataset: TokenDataset,
    collate: Collator,
    batch_size: int,
    limit: int | None = None,
    description: str = "loss",
    progress: bool = True,
) -> dict[str, Any]:
    """{"loss": mean over all learnt tokens, "perplexity", "tokens"} of the first `limit` examples, the model as it
    stands.
    """
    count = len(dataset) if limit is None else min(limit, len(dataset))
    device = next(model.parameters()).device
    training = model.training
    total, tokens = 0.0, 0
    model.eval()
    try:
        with torch.no_grad(), tqdm(total=count, desc=description, unit=" examples", disable=None if progress else True) as bar:
            for places in batches(model, dataset.lengths[:count], batch_size):
                batch = collate([dataset[place] for place in places])
                learnt = int((batch["labels"][:, 1:] != IGNORED).sum())
                if learnt:
                    inputs = {
                        key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()
                    }
                    total += float(model(**inputs, use_cache=False).loss) * learnt
                    tokens += learnt
                bar.update(len(places))
    finally:
        model.train(training)
    loss = total / tokens if tokens else math.nan
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}
