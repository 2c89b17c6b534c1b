"""flaxmodels: vision models in Linen, with batch statistics beside the parameters."""

import jax
from models import IMAGES, Model


def resnet18():
    """Convolutions with strides and none with a bias; statistics in a collection of their own."""
    import flaxmodels

    model = flaxmodels.ResNet18(output="logits", pretrained=None, num_classes=5)
    return model, jax.jit(lambda: model.init(jax.random.key(0), IMAGES, train=False))()


def vgg16():
    """Convolutions with biases, and dense layers after them."""
    import flaxmodels

    model = flaxmodels.VGG16(output="logits", pretrained=None, num_classes=5, include_head=False)
    return model, jax.jit(lambda: model.init(jax.random.key(0), IMAGES, train=False))()


ROWS = [
    Model("flaxmodels_resnet18", "flaxmodels", resnet18, lambda: (IMAGES, False), 20, 0),
]
