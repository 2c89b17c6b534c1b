"""flaxmodels: vision models in Linen, with batch statistics beside the parameters."""

import jax
import models
from models import Model

IMAGES = models.IMAGES[:, :8, :8]


def resnet18():
    """Convolutions with strides and none with a bias; statistics in a collection of their own."""
    import flaxmodels

    model = flaxmodels.ResNet18(output="logits", pretrained=None, num_classes=5)
    return model, jax.jit(lambda: model.init(jax.random.key(0), IMAGES, train=False))()


ROWS = [
    Model("flaxmodels_resnet18", "flaxmodels", resnet18, lambda: (IMAGES, False), 21, 145_760,
          target_modules=("Conv_0", "Conv_1", "Conv_2", "Dense_0"), rate=1e-3),
]  # fmt: skip
