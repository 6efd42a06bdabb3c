"""What every test shares: no network, one thread, fixed seeds, and pico models (see pico.py)."""

from __future__ import annotations

import os
import random
import shutil
import socket
import tempfile
from typing import TYPE_CHECKING, Any

# Libraries read these when first imported, and child processes inherit them.
HF_HOME = tempfile.mkdtemp(prefix="speft-tests-")
os.environ.update(
    HF_HOME=HF_HOME,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    MPLBACKEND="Agg",
    CUDA_VISIBLE_DEVICES=os.environ.get("SPEFT_TEST_CUDA", ""),
    DS_ACCELERATOR=os.environ.get("DS_ACCELERATOR", "cpu"),
)
for name in ("HF_ENDPOINT", "HF_TOKEN", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

torch.set_num_threads(1)
settings.register_profile("speft", deadline=None, derandomize=True, database=None)
settings.register_profile("mutation", settings.get_profile("speft"), max_examples=30, phases=(Phase.explicit, Phase.generate))
settings.load_profile("speft")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start ranks of their own all run in one worker: two at once would fight over the cores."""
    for item in items:
        if item.get_closest_marker("distributed"):
            item.add_marker(pytest.mark.xdist_group("distributed"))


def pytest_unconfigure() -> None:
    """Remove this process's Hub cache."""
    shutil.rmtree(HF_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test may talk to this machine; an attempt to reach any other fails it at once instead of after a time-out."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"
        if not (host in ("localhost", "::1") or host.startswith("127.")):
            raise AssertionError(f"a test reached for the network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def pico_llama(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A pico Llama, once with the head tied to the embeddings and once without."""
    import pico

    return pico.llama(tied=request.param)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def pico_opt(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A pico OPT, tied and untied."""
    import pico

    return pico.opt(tied=request.param)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def pico_gpt2(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A pico GPT-2, tied and untied."""
    import pico

    return pico.gpt2(tied=request.param)


@pytest.fixture
def pico_bert() -> PreTrainedModel:
    """A pico BERT with a classification head."""
    import pico

    return pico.bert()


@pytest.fixture(params=["llama", "opt", "gpt2", "bert"])
def pico_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each architecture in turn, tied where it can be."""
    import pico

    return pico.MODELS[request.param]()
