"""What to tell `torch.compile` about an injected model."""

from typing import Any


def compile_options() -> dict[str, Any]:
    """What to give `torch.compile(model, options=...)`, so that branches that read one value are computed together.

    In regions they are joined at injection. Python that no graph holds, such as the attention of Hugging Face's
    models, becomes a graph when it is compiled: there x A_1^T, x A_2^T, ... become parts of x cat(A_1, A_2, ...)^T, and
    so do their gradients. The options have a stable identity, so that the compiler's caches work with them.

    Example:
        >>> import torch, lorafx
        >>> model = lorafx.inject(torch.nn.Linear(4, 4))
        >>> compiled = torch.compile(model, options=lorafx.compile_options())
    """
    from ._model.inductor import JoinBranches  # imports the compiler, which takes a second
    return {"pre_grad_custom_pass": JoinBranches()}
