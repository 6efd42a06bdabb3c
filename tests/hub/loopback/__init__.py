"""A Hugging Face Hub on the loopback interface, in memory, for tests: the real client talks to it over real HTTP.

    with LoopbackHub({"hf_alice": "alice"}) as hub:      # token -> user
        ...                                              # HF_ENDPOINT=hub.url
        hub.inject("corrupt", "adapter_model", times=1)  # see `faults.py`
        hub.requests                                     # what was asked, in order

Two origins, as the real one has: `hub.url` answers the API and small files, `hub.cdn` keeps the large (LFS) ones.
`store.py` holds repositories and commits, `routes.py` the API, `server.py` the sockets, `faults.py` what can go wrong.
"""

from .server import LoopbackHub

__all__ = ["LoopbackHub"]
