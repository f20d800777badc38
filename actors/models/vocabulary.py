"""Whether a model that is given the policy's tokens reads them as the policy does."""

from __future__ import annotations

from actors.models.configuration import ModelError
from actors.models.loading import load_tokenizer
from actors.specs import ModelSpec


def check_same_tokens(policy: ModelSpec, name: str | None, role: str) -> None:
    """Compare the tokenizers alone of the policy and of `name`, the model of `role`; None is the
    policy's own.

    Raises:
        ModelError: there is no such model, or its vocabulary is another.
    """
    if name is None or name == policy.name:
        return
    other = policy.model_copy(update={"name": name, "revision": None})
    own, others = (load_tokenizer(spec, writes=False).get_vocab() for spec in (policy, other))
    if own != others:
        raise ModelError(
            f"model {name!r} has another vocabulary than the policy {policy.name!r}, and "
            f"the {role} reads the policy's tokens; give a model with the same tokenizer, or leave "
            f"{role}.model out to take the policy's model"
        )
