"""The grid of linear classifiers that the linear evaluation trains side by side.

Shapes: B images per process, N patches, D width, C classes. A backbone's tokens come as one pair per block,
last block last: patch tokens (B, N, D) and cls token (B, D), both normalised.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dinov2 import distributed
from dinov2.errors import ConfigError

Tokens = Sequence[tuple[Tensor, Tensor]]

# Learning rates are stated for this many images per step.
REFERENCE_BATCH = 256
NAME_DECIMALS = 5


def create_linear_input(x_tokens_list: Tokens, use_n_blocks: int, use_avgpool: bool) -> Tensor:
    """Concatenate the cls tokens of the last blocks and, if asked, the mean patch token of the last one.

    Returns:
        (B, ``use_n_blocks`` * D), or D wider, float32.
    """
    parts = [cls_token for _, cls_token in x_tokens_list[-use_n_blocks:]]
    if use_avgpool:
        parts.append(x_tokens_list[-1][0].mean(dim=1))
    return torch.cat(parts, dim=-1).float()


class LinearClassifier(nn.Module):
    """One linear layer on :func:`create_linear_input`.

    Args:
        out_dim: Width of its input.
        use_n_blocks: How many last blocks give their cls token.
        use_avgpool: Whether the mean patch token is added.
        num_classes: C.
    """

    def __init__(self, out_dim: int, use_n_blocks: int, use_avgpool: bool, num_classes: int = 1000) -> None:
        super().__init__()
        self.use_n_blocks = use_n_blocks
        self.use_avgpool = use_avgpool
        self.linear = nn.Linear(out_dim, num_classes)
        nn.init.normal_(self.linear.weight, mean=0.0, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_tokens_list: Tokens) -> Tensor:
        """Return the logits (B, C)."""
        return self.linear(create_linear_input(x_tokens_list, self.use_n_blocks, self.use_avgpool))


class AllClassifiers(nn.Module):
    """Classifiers by name, all applied to the same tokens."""

    def __init__(self, classifiers_dict: dict[str, LinearClassifier]) -> None:
        super().__init__()
        self.classifiers_dict = nn.ModuleDict(classifiers_dict)

    def forward(self, inputs: Tokens) -> dict[str, Tensor]:
        """Return the logits (B, C) by name."""
        # Classifiers that differ in their learning rate only have the same input.
        kinds = {(c.use_n_blocks, c.use_avgpool) for c in self.classifiers_dict.values()}
        prepared = {kind: create_linear_input(inputs, *kind) for kind in kinds}
        return {
            name: classifier.linear(prepared[classifier.use_n_blocks, classifier.use_avgpool])
            for name, classifier in self.classifiers_dict.items()
        }

    def __len__(self) -> int:
        return len(self.classifiers_dict)


class LinearPostprocessor(nn.Module):
    """Turns backbone tokens into what metrics take.

    Args:
        linear_classifier: Gives the logits.
        class_mapping: For a dataset that has only some of the classes: the classifier's index of each of the
            dataset's classes.
    """

    def __init__(self, linear_classifier: nn.Module, class_mapping: Tensor | None = None) -> None:
        super().__init__()
        self.linear_classifier = linear_classifier
        self.class_mapping = class_mapping

    def forward(self, samples: Tokens, targets: Tensor) -> dict[str, Tensor]:
        """Return logits (B, C) of the dataset's classes, and the targets."""
        preds = self.linear_classifier(samples)
        if self.class_mapping is not None:
            preds = preds[:, self.class_mapping.to(preds.device)]
        return {"preds": preds, "target": targets}


def scale_lr(learning_rates: float, batch_size: int) -> float:
    """Return a learning rate for ``batch_size`` images per process, given one for 256 images."""
    return learning_rates * (batch_size * distributed.get_global_size()) / REFERENCE_BATCH


def name_learning_rates(learning_rates: Sequence[float]) -> dict[float, str]:
    """Return how each learning rate is written in names: with 5 decimals, more where two would be equal.

    Raises:
        ConfigError: Learning rates are repeated, or not above zero.
    """
    if len(set(learning_rates)) < len(learning_rates) or min(learning_rates, default=0) <= 0:
        raise ConfigError(f"the learning rates are {list(learning_rates)}: give different numbers above 0")
    names = {lr: f"{lr:.{NAME_DECIMALS}f}" for lr in learning_rates}
    written = list(names.values())
    decimals = NAME_DECIMALS
    clashing = [lr for lr, name in names.items() if written.count(name) > 1]
    while len({names[lr] for lr in clashing if float(names[lr])}) < len(clashing):
        decimals += 1
        names |= {lr: f"{lr:.{decimals}f}" for lr in clashing}
    return {lr: name.replace(".", "_") for lr, name in names.items()}


def setup_linear_classifiers(
    sample_output: Tokens,
    n_last_blocks_list: Sequence[int],
    learning_rates: Sequence[float],
    batch_size: int,
    num_classes: int = 1000,
) -> tuple[nn.Module, list[dict]]:
    """Build one classifier per number of blocks, pooling and learning rate.

    Args:
        sample_output: Tokens of any batch, for the widths and the device.
        learning_rates: For 256 images per step.
        batch_size: Images per process.

    Returns:
        The classifiers (:class:`AllClassifiers`, synchronised between processes where there are several) and
        the optimizer's parameter groups with their scaled learning rates.
    """
    scaled = [scale_lr(lr, batch_size) for lr in learning_rates]
    lr_names = name_learning_rates(scaled)
    classifiers, param_groups = {}, []
    for n_blocks in n_last_blocks_list:
        for avgpool in (False, True):
            width = create_linear_input(sample_output, n_blocks, avgpool).shape[1]
            for lr in scaled:
                classifier = LinearClassifier(width, n_blocks, avgpool, num_classes)
                classifier.to(sample_output[0][0].device)
                classifiers[f"classifier_{n_blocks}_blocks_avgpool_{avgpool}_lr_{lr_names[lr]}"] = classifier
                param_groups.append({"params": list(classifier.parameters()), "lr": lr})
    linear_classifiers = AllClassifiers(classifiers)
    if distributed.is_enabled():
        return nn.parallel.DistributedDataParallel(linear_classifiers), param_groups
    return linear_classifiers, param_groups


def unwrapped(linear_classifiers: nn.Module) -> AllClassifiers:
    """Return the classifiers themselves, without the wrapper that synchronises processes."""
    return getattr(linear_classifiers, "module", linear_classifiers)
